"""lopd_train: SFT and Lightning OPD, the leanest trainer that reads lopd artifacts.

    lopd_train.train_sft(model="student", data="sft.parquet", output="sft")
    result = lopd_train.train(artifact="artifact", student="sft", output="opd")
    result.first_eval["reverse_kl"], result.last_eval["reverse_kl"]

Read `opd`, then `losses`, `trainer` and `student`: that is the method, whole.
"""

from __future__ import annotations

from lopd_train.config import OPD, SFT, TrainConfig
from lopd_train.opd import train_opd
from lopd_train.runlog import OnProgress, Progress
from lopd_train.sft import train_sft
from lopd_train.trainer import RunResult

train = train_opd  # what this package is for

__all__ = [
    "OPD",
    "SFT",
    "OnProgress",
    "Progress",
    "RunResult",
    "TrainConfig",
    "train",
    "train_opd",
    "train_sft",
]
