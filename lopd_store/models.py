"""Models as they lie on disk or on the Hub: found, checked, loaded, and split into body and head.

A model is named by a directory of safetensors, a GGUF file, or a Hub id (`owner/name` or `owner/name@revision`).
Pickled weights are never opened. torch and transformers are imported only when something is loaded.

    files = models.find("Qwen/Qwen3-8B")
    tokenizer, model = models.load_tokenizer(files), models.load_model(files, dtype="bfloat16", device="cuda")
"""

from __future__ import annotations

import ctypes
import gc
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd_store import strictjson
from lopd_store.errors import DataError, InputError, UnavailableError

if TYPE_CHECKING:
    import torch

PROVENANCE_FILE = "lopd-provenance.json"
DTYPES = ("float32", "bfloat16", "float16")
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_LOGIT_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md"]
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # as glibc's malloc.h has them


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Where a model's files are, and what to call it."""

    directory: Path
    weights: tuple[Path, ...]  # sorted
    gguf_file: str | None  # the file's name where the weights are GGUF
    name: str  # Hub id, or the last component of the path
    revision: str | None  # resolved Hub commit
    adapter: Path | None = None  # a PEFT adapter; all the rest is its base model's


def find(model: str | Path) -> ModelFiles:
    """Find a model's files: a directory of safetensors, a GGUF file, or a Hub id, which is downloaded."""
    path = Path(model)
    if path.is_dir():
        return _in_directory(path, name=path.resolve().name, revision=None)
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(
                f"`{path}` is not a model",
                expected="a directory of safetensors, a .gguf file, or a Hub id",
                hint="name the directory that holds the file",
            )
        return ModelFiles(directory=path.parent, weights=(path,), gguf_file=path.name, name=path.name, revision=None)
    if (match := _HUB_ID.fullmatch(str(model))) and not str(model).startswith((".", "/")):
        return _on_hub(match[1], match[2])
    raise InputError(
        f"no model at `{model}`",
        expected="a directory of safetensors, a .gguf file, or a Hub id such as `Qwen/Qwen3-8B`",
        hint="check the path",
    )


def load_config(files: ModelFiles) -> Any:
    """The configuration of a model, as transformers loads it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(files.directory, **_options(files))
    except (OSError, ValueError) as error:
        raise DataError(f"the config of `{files.name}` does not load: {_first_line(error)}") from error


def load_tokenizer(files: ModelFiles) -> Any:
    """The tokenizer that belongs to a model, as transformers loads it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(files.directory, **_options(files))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the tokenizer of `{files.name}` does not load: {_first_line(error)}",
            hint="a model directory needs tokenizer.json beside its weights",
        ) from error


def load_model(files: ModelFiles, *, dtype: str = "float32", device: str = "cpu", tensor_parallel_size: int = 1) -> Any:
    """The causal language model, in evaluation mode, all weights in `dtype` on `device`.

    `auto` is as many devices as it takes, layer after layer, by accelerate. With a `tensor_parallel_size` this is one
    of as many processes of torch.distributed, and gets its share of every layer. Raises DataError where a weight is
    missing: transformers would make it up and go on.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    options = _options(files) | ({"use_safetensors": True} if files.gguf_file is None else {})
    options |= {"dtype": getattr(torch, dtype), "output_loading_info": True, "ignore_mismatched_sizes": True}
    options |= {"device_map": "auto"} if device == "auto" else {}
    if tensor_parallel_size > 1:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(tp_size=tensor_parallel_size)
    try:
        with without_bars():
            model, found = AutoModelForCausalLM.from_pretrained(files.directory, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"the model `{files.name}` does not load: {_first_line(error)}") from error
    if files.adapter is not None:
        model = _with_adapter(model, files)
    if lacking := sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}):
        raise DataError(
            f"the weights of `{files.name}` are not those of its config",
            expected=f"a {type(model).__name__} with every weight",
            actual=f"{len(lacking)} are missing or of another shape, such as `{lacking[0]}`",
        )
    return (model if device == "auto" or tensor_parallel_size > 1 else model.to(device)).eval()


def _with_adapter(model: Any, files: ModelFiles) -> Any:
    """The model with the adapter merged into its weights."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError(f"`{files.name}` is a PEFT adapter", hint='pip install "lopd[lora]"') from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in words that it will give up
            return PeftModel.from_pretrained(model, files.adapter).merge_and_unload()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"the adapter `{files.name}` does not load: {_first_line(error)}") from error


@contextmanager
def without_bars() -> Iterator[None]:
    """Silence the progress bars of transformers, which say nothing while a model loads or saves in seconds."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def copy_without_quantization(model: Any) -> Any:
    """A GGUF-loaded model as an ordinary one that `save_pretrained` accepts; the weights are shared."""
    config = type(model.config).from_dict(
        {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    )
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain.eval()


@dataclass(frozen=True, kw_only=True)
class SplitModel:
    """A causal language model as its body and its head, so that full logits need never exist."""

    body: Callable[..., Any]  # input_ids, attention_mask, … -> output with last_hidden_state [batch, length, width]
    logits: Callable[[torch.Tensor], torch.Tensor]  # hidden states [n, width] -> float32 logits [n, output_width]
    output_width: int


def split(model: Any) -> SplitModel:
    """Split a model, and prove on a short input that body and head give `model(...).logits`.

    What its family does to the logits after the head is looked for among what its config names. Raises DataError where
    none of that gives the model's own logits: a family that scales or caps them in a way we do not know.
    """
    import torch

    body, head = model.base_model, model.get_output_embeddings()

    def logits(hidden: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
        values: torch.Tensor = head(hidden).float()
        values = values if scale == 1 else values * scale
        return values if cap is None else cap * torch.tanh(values / cap)

    probe = torch.arange(8, device=model.device)[None] % head.weight.shape[0]
    training = model.training
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=probe).logits.float()
        hidden = body(input_ids=probe).last_hidden_state
    model.train(training)
    tolerance = max(1e-3, 4 * torch.finfo(head.weight.dtype).eps)  # the model scales and caps in its own precision
    differences = []
    for scale, cap in _finishes(model.config):
        with torch.no_grad():
            actual = logits(hidden, scale, cap).to(expected.device)
        if torch.allclose(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
            return SplitModel(
                body=body, logits=partial(logits, scale=scale, cap=cap), output_width=head.weight.shape[0]
            )
        differences.append(float((actual - expected).abs().max()))
    raise DataError(
        f"the head of a `{type(model).__name__}` is not understood",
        expected="logits equal to the model's own",
        actual=f"a difference of up to {min(differences):.3g}",
        hint="please report the model family; its logits are scaled in a way that lopd does not know",
    )


def _finishes(config: Any) -> Iterator[tuple[float, float | None]]:
    """The (scale, cap) that a config may mean for its logits; of one name one family divides, another multiplies."""
    text = config.get_text_config()
    named = [float(value) for name in _LOGIT_SCALES if (value := getattr(text, name, None))]
    cap = getattr(text, "final_logit_softcapping", None)
    for scale in [factor for value in named for factor in (value, 1 / value)] + [1.0]:
        yield from ((scale, limit) for limit in ([float(cap)] if cap else []) + [None])


def context_length(config: Any) -> int | None:
    """The longest sequence that the model was made for, or None where its config does not say."""
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def load_generation_config(files: ModelFiles) -> Any:
    """What a model generates with unless told otherwise, as transformers loads it."""
    from transformers import GenerationConfig

    if (files.directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(files.directory)
    return GenerationConfig.from_model_config(load_config(files))


def stop_token_ids(generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a response: the generation config's and the tokenizer's, sorted."""
    ids: set[int] = set()
    for value in (generation_config.eos_token_id, tokenizer.eos_token_id):
        ids.update([] if value is None else [value] if isinstance(value, int) else value)
    return tuple(sorted(ids))


def default_device() -> str:
    """`cuda` where there is one, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_device(asked: str | None) -> str:
    """The device asked for, or the default; raises InputError where torch cannot use it. `auto` is several."""
    import torch

    if asked is None:
        return default_device()
    if asked == "auto":
        if find_spec("accelerate") is None:
            raise InputError("the device `auto` needs accelerate", hint="pip install accelerate")
        return asked
    try:
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"the device `{asked}` cannot be used", actual=_first_line(error)) from error
    return asked


def keep_freed_memory(device: str) -> None:
    """Where a model runs on the CPU, let this process use again what it frees; `free_memory` gives it back.

    By default glibc's `malloc` gives large blocks and the free end of its heap back to the system, layer after layer,
    and gets them anew page by page, which takes up to a seventh of the time of a forward pass.
    """
    libc = ctypes.CDLL(None)
    if device == "cpu" and hasattr(libc, "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(_M_MMAP_MAX, 0)


def free_memory() -> None:
    """Give back what models that nobody uses any more have taken: torch and `malloc` keep it for this process."""
    import torch

    gc.collect()  # what accelerate spreads over devices refers to itself
    torch.cuda.empty_cache()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _options(files: ModelFiles) -> dict[str, Any]:
    """What every `from_pretrained` is told: no code of a repository is run, and nobody is asked whether it may be."""
    options: dict[str, Any] = {"trust_remote_code": False}
    return options if files.gguf_file is None else options | {"gguf_file": files.gguf_file}


def _in_directory(directory: Path, *, name: str, revision: str | None) -> ModelFiles:
    weights = tuple(sorted(directory.glob("*.safetensors")))
    if (directory / "adapter_config.json").is_file():
        return _adapter(directory, name=name, revision=revision)
    if not weights:
        pickled = sorted(file.name for file in directory.iterdir() if file.suffix in _PICKLED)
        if pickled:
            raise DataError(
                f"`{name}` has pickled weights, which can run code when opened",
                expected="*.safetensors or a .gguf file",
                actual=", ".join(pickled),
                hint="convert them with `save_pretrained` on a machine that trusts them",
            )
        ggufs = sorted(file.name for file in directory.glob("*.gguf"))
        raise DataError(
            f"`{name}` has no weights",
            expected="*.safetensors",
            actual=", ".join(ggufs) or "none",
            hint=f"name the file: `{directory / ggufs[0]}`" if ggufs else "check the path",
        )
    if not (directory / "config.json").is_file():
        raise DataError(f"`{name}` has weights but no config.json", hint="copy it from where the weights came")
    return ModelFiles(directory=directory, weights=weights, gguf_file=None, name=name, revision=revision)


def _adapter(directory: Path, *, name: str, revision: str | None) -> ModelFiles:
    """A PEFT adapter with the base model that its configuration names, beside it or on the Hub."""
    config = strictjson.loads((directory / "adapter_config.json").read_bytes(), where=f"{name}: adapter_config.json")
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise DataError(f"the adapter `{name}` does not name its base model", hint="merge it into its base model")
    if not list(directory.glob("*.safetensors")):
        raise DataError(f"the adapter `{name}` has no safetensors", hint="save it with `safe_serialization=True`")
    beside = directory.parent / base
    at = config.get("revision")
    files = find(beside if beside.is_dir() else f"{base}@{at}" if at and not Path(base).exists() else base)
    if files.adapter is not None or files.gguf_file is not None:
        raise DataError(f"the base model of the adapter `{name}` is not a plain model", actual=files.name)
    return replace(files, adapter=directory, name=name, revision=revision)


def _on_hub(repository: str, revision: str | None) -> ModelFiles:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        directory = Path(snapshot_download(repository, revision=revision, allow_patterns=_HUB_PATTERNS))
    except RepositoryNotFoundError as error:
        raise InputError(
            f"no model `{repository}`, neither a local path nor on the Hub",
            hint="check the name; is it gated or private?",
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UnavailableError(f"`{repository}` could not be fetched: {_first_line(error)}") from error
    return _in_directory(directory, name=repository, revision=directory.name)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
