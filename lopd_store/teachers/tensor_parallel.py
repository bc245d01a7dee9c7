"""A teacher split over several devices of one machine, by the tensor parallelism of transformers.

Each device has a process with a share of every layer. All of them are given every batch and run it in step; what the
first one finds is the answer. What one of them cannot do, such as fit a batch into its memory, the others do not know
of: they wait for it, and all are ended. They end with the process that started them, too, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but torch does not type it so

from lopd_store import models
from lopd_store.errors import InputError, LopdError, UnavailableError
from lopd_store.manifest import Scoring
from lopd_store.processes import interrupts_held_back
from lopd_store.rollouts import Rollout
from lopd_store.teachers import RolloutScores
from lopd_store.teachers.transformers import TransformersTeacher, batches

# What one process waits for another. Torch's own five minutes are few where a disk is slow and one loads before the
# other; that one has ended is noticed at once, whatever this is.
_PATIENCE = timedelta(hours=2)


class TensorParallelTeacher:
    """`TransformersTeacher` over `size` devices, in as many processes, which end with this object.

    Both loading and `score` raise what a process could not do, and UnavailableError where one of them ends. Then, and
    where Ctrl-C interrupts them, all have ended, and the object is of no more use.
    """

    def __init__(
        self,
        model: str,
        *,
        size: int,
        vocab_size: int,
        dtype: str,
        device: str,
        batch_tokens: int,
        reference: str | None = None,
    ) -> None:
        self.scoring = Scoring(engine="transformers", dtype=dtype)
        self._batch_tokens = batch_tokens
        settings = {
            "model": model,
            "vocab_size": vocab_size,
            "dtype": dtype,
            "device": device,
            "batch_tokens": batch_tokens,
            "reference": reference,
            "tensor_parallel_size": size,
        }
        context = multiprocessing.get_context("spawn")
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where they find one another
        processes: list[BaseProcess] = []
        self._lines: list[Connection] = []
        self._end = weakref.finalize(self, _end, processes, self._lines)
        for rank in range(size):
            ours, theirs = context.Pipe()
            told = (theirs, rank, self._store.port, torch.get_num_threads(), settings)
            process = context.Process(target=_run, args=told, daemon=True)
            with interrupts_held_back():
                process.start()
            theirs.close()  # now the line ends with the process
            processes.append(process)
            self._lines.append(ours)
        self.context_length: int | None = self._answer()

    def score(self, rollouts: Sequence[Rollout], k: int) -> Iterator[tuple[int, RolloutScores]]:
        """See `Teacher.score`."""
        for batch in batches(rollouts, self._batch_tokens):
            for index, scores in self._answer([rollouts[index] for index in batch], k):
                yield batch[index], scores

    def _answer(self, *question: Any) -> Any:
        """What the first process answers to a question, or once it has loaded the teacher; all of them must."""
        answers: dict[Connection, Any] = {}
        try:
            for line in self._lines if question else ():
                line.send(question)
            while waiting := [line for line in self._lines if line not in answers]:
                ready = wait(waiting)
                for line in filter(ready.__contains__, waiting):
                    answer = line.recv()
                    if isinstance(answer, LopdError):
                        raise answer
                    answers[line] = answer
        except (EOFError, OSError) as error:
            raise UnavailableError(
                f"one of the {len(self._lines)} processes of the teacher has ended",
                hint="if it has not said why, memory may have run out: try a smaller `--batch-tokens`",
            ) from error
        finally:
            if len(answers) < len(self._lines):
                self._end()
        return answers[self._lines[0]]


def require_tensor_parallel(model: str, size: int, device: str) -> None:
    """Raise InputError where a model cannot be split over so many devices of this kind, or there are not as many."""
    if device not in ("cpu", "cuda"):
        raise InputError(
            f"a teacher cannot be split over the device `{device}`",
            expected="cuda or cpu",
            hint="leave `--device` out, or `--tensor-parallel-size`",
        )
    if device == "cuda" and torch.cuda.device_count() < size:
        raise InputError(
            "`tensor_parallel_size` is out of range", expected=f"at most {torch.cuda.device_count()} GPUs", actual=size
        )
    files = models.find(model)
    if files.gguf_file is not None or files.adapter is not None:
        raise InputError(
            f"`{files.name}` cannot be split over devices",
            expected="safetensors of a whole model",
            actual="a GGUF file" if files.gguf_file is not None else "a PEFT adapter",
        )
    config = models.load_config(files).get_text_config()
    if not config.base_model_tp_plan:
        raise InputError(
            f"transformers has no tensor parallelism for a `{config.model_type}`",
            hint="use `--device auto`, or `--engine http` with a server that splits it",
        )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if heads % size:
        raise InputError(
            f"`{files.name}` cannot be split over {size} devices",
            expected=f"a number that divides its {heads} key-value heads",
            actual=size,
        )


def _run(line: Connection, rank: int, port: int, threads: int, settings: dict[str, Any]) -> None:
    """What each process does: load its share, then score whatever it is given, until nobody asks any more."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if settings["device"] == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # transformers would take GPUs where there are any
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(threads)
    try:
        torch.distributed.init_process_group(
            "gloo" if settings["device"] == "cpu" else "nccl",
            store=TCPStore("127.0.0.1", port, timeout=_PATIENCE),
            rank=rank,
            world_size=settings["tensor_parallel_size"],
            timeout=_PATIENCE,
        )
        teacher = TransformersTeacher(**settings)
        line.send(teacher.context_length)
        while True:
            scores = list(teacher.score(*line.recv()))
            line.send(scores if rank == 0 else None)
    except LopdError as error:
        line.send(error)
        line.poll(None)  # the others may be in a step with this process, and would fail where it ended
    except (EOFError, BrokenPipeError):
        pass


def _end_with_parent() -> None:
    """Leave when the parent has ended, in the middle of a step, too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _end(processes: list[BaseProcess], lines: list[Connection]) -> None:
    """End the processes, which may be waiting for one another."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    for line in lines:
        line.close()
