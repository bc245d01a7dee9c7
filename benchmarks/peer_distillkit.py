"""Some steps of DistillKit's own trainer, for a process of its own whose Python has what DistillKit wants.

    path/to/python benchmarks/peer_distillkit.py JOB.json

The job names a checkout, a student and an artifact exported as `distillkit`; the last line of the answer is JSON. It is
run as its users run it: its own configuration, data set, signal source and trainer, on rows of one length.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")


def main(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Seconds of each step, the loss of the first, and the peak memory of the process in MB."""
    import datasets
    import trl
    import yaml
    from transformers import TrainerCallback

    sys.path.insert(0, job["distillkit"])
    kit = import_module("distillkit.main")
    pack = import_module("distillkit.pack_logits")
    trainer_module = import_module("distillkit.trainer")
    begun: list[float] = []
    ended: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Notes when a step begins and ends."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            begun.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ended.append(time.perf_counter())

    export = Path(job["export"])
    rows = datasets.load_dataset(str(export), split="train", cache_dir=str(scratch / "cache"))
    rows.map(pack._truncate_row).save_to_disk(str(scratch / "rows"))  # a row of the teacher for every token
    config = kit.DistillationRunConfig.model_validate(
        {
            "model": job["student"],
            "output_path": str(scratch / "trained"),
            "dataset": {"train_dataset": {"disk_path": str(scratch / "rows")}, "prepacked": True, "seed": None},
            "teacher": {
                "kind": "dataset",
                "logprob_compressor": yaml.safe_load((export / "compression_config.yaml").read_bytes()),
            },
            "sequence_length": job["tokens"],
            "use_flash_attention": False,
            "loss_functions": [
                # Its other way with the tail, `symmetric_uniform`, is NaN where the entries have all of the mass.
                {"function": "kl", "weight": 1.0, "temperature": 1.0, "missing_probability_handling": "zero"}
            ],
        }
    )
    tokenizer = kit.load_tokenizer(config)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    train, _ = kit.load_data(config.dataset, tokenizer)
    trainer = trainer_module.DistillationTrainer(
        model=kit.load_student_model(config, vocab_size),
        config=config,
        signal_source=kit.create_signal_source(config, vocab_size),
        true_vocab_size=vocab_size,
        train_dataset=train,
        args=trl.SFTConfig(
            output_dir=config.output_path,
            max_length=config.sequence_length,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            **job["training_args"],
        ),
        data_collator=kit.collate_packed_batch,
        callbacks=[Clock()],
    )
    trainer.train()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024 / 1e6
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = [end - start for start, end in zip(begun, ended, strict=True)]
    return {"seconds": seconds, "loss": losses[0], "peak": peak}


if __name__ == "__main__":
    file = Path(sys.argv[1])
    print(json.dumps(main(json.loads(file.read_bytes()), file.parent)))
