# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The commands ``train-forecast``, ``eval-forecast`` and ``inspect``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from vllm_sparse.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from vllm_sparse.training.settings import Packing, TrainSettings
    from vllm_sparse.training.trainer import StepLog, Trainer

_DATA = (
    ".txt, .jsonl, folders, or datasets for the package of that name (NAME, NAME:SPLIT or "
    "NAME:CONFIGURATION:SPLIT), of which no more is read than is used"
)


def add_command(subparsers: Any) -> None:
    """Adds the parsers."""
    _add_train(subparsers)
    _add_eval(subparsers)
    inspect = subparsers.add_parser(
        "inspect", help="show what a Forecast file holds", description=_inspect.__doc__
    )
    inspect.add_argument("file", type=Path)
    inspect.set_defaults(run=_guarded(_inspect))


def _add_train(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train-forecast",
        help="train a Forecast for the SPARDA backend",
        description="Train a Forecast on a frozen Hugging Face model. Settings come from --recipe "
        "and from the options, which win.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="Hugging Face directory or hub name")
    parser.add_argument("--data", required=True, nargs="+", help=_DATA)
    parser.add_argument("--out", type=Path, required=True, help="the Forecast, .safetensors")
    parser.add_argument(
        "--folder", type=Path, help="for checkpoints and the log (default: beside --out)"
    )
    parser.add_argument(
        "--recipe",
        help="name of a recipe, or a YAML file. dense: densely trained models (Llama, Qwen) on a "
        "GPU; dense-small: the same on one CPU core; sparse-small: that for sparse prompts too; "
        "sparda: MiniCPM4.1, as is none",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint, if any"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="keep what the model computes here, so that only the first epoch runs it (per "
        "sequence about layers * queries * (2 * hidden + 4 * KV heads * blocks) bytes)",
    )
    parser.add_argument("--base-model", help="name to record instead of --model's")
    for name, value in _setting_fields().items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", metavar="VALUE", help=value, dest=f"set_{name}"
        )
    parser.set_defaults(run=_guarded(_train))


def _add_eval(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "eval-forecast",
        help="measure how well selectors find the blocks a model attends to",
        description="Recall of the exact best blocks and attention mass captured, per layer.",
    )
    parser.add_argument("--model", required=True, help="Hugging Face directory or hub name")
    parser.add_argument("--forecast", type=Path, help="Forecast to judge beside the others")
    parser.add_argument("--data", required=True, nargs="+", help=_DATA)
    parser.add_argument("--seq-len", type=int, default=4096, help="tokens per sequence")
    parser.add_argument("--sequences", type=int, default=4, help="how many, spread over the data")
    parser.add_argument(
        "--queries", type=int, default=256, help="query tokens per sequence; 0: all"
    )
    parser.add_argument("--tail-queries", type=int, default=0, help="how many of them are the last")
    parser.add_argument("--packing", choices=("concat", "documents"), default="concat")
    parser.add_argument("--text-key", default="text", help="key of the text in JSON lines")
    for name in ("block-size", "kernel-stride", "init-blocks", "local-blocks", "top-k"):
        parser.add_argument(f"--{name}", type=int, help="default: the Forecast's")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--plot", type=Path, help="draw recall per layer (needs matplotlib)")
    parser.set_defaults(run=_guarded(_evaluate))


def _setting_fields() -> dict[str, str]:
    """Names of the training settings with their help, without importing heavy packages."""
    from vllm_sparse.training.settings import TrainSettings

    result = {}
    for name, field in TrainSettings.model_fields.items():
        choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
        listed = f" ({', '.join(choices)})" if choices else ""
        text = f"{field.description}{listed} [{field.default}]"
        result[name] = text.replace("%", "%%")
    return result


def _guarded(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Says what to install if a package is missing."""

    def run(arguments: argparse.Namespace) -> int:
        try:
            return command(arguments)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"the package {error.name} is missing; install it with: "
                "pip install '.[train]' in the checkout of vllm-sparse"
            ) from error

    return run


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the tokenizer of {model!r}: {error}") from error


def _sequences(
    arguments: argparse.Namespace,
    seq_len: int,
    packing: Packing,
    text_key: str,
    limit: int | None,
    needed: int,
    is_main: bool = True,
) -> Tensor:
    """Reads ``--data``, and says how much of it if it takes long or is not all."""
    from tqdm import tqdm

    from vllm_sparse.training.data import read_sequences

    sequences, left = read_sequences(
        arguments.data,
        _tokenizer(arguments.model),
        seq_len,
        packing,
        text_key,
        limit,
        needed,
        lambda documents: tqdm(documents, "reading", unit=" documents", disable=not is_main),
    )
    if left and is_main:
        print(
            f"not read: {', '.join(left)}, as the sources before give {len(sequences)} sequences. "
            "For all of them give more --steps or a larger --max-sequences, or each in part",
            file=sys.stderr,
        )
    return sequences


def _train(arguments: argparse.Namespace) -> int:
    """Trains, and exports at the end, on Ctrl-C and on SIGTERM."""
    from vllm_sparse.training.files import export_forecast
    from vllm_sparse.training.settings import load_train_settings
    from vllm_sparse.training.trainer import Interrupted

    overrides = {
        name.removeprefix("set_"): value
        for name, value in vars(arguments).items()
        if name.startswith("set_") and value is not None
    }
    settings = load_train_settings(arguments.recipe, overrides)
    folder = arguments.folder or arguments.out.with_suffix(".run")
    _check_files(arguments, folder)
    trainer, name = _prepare(arguments, settings, folder)
    status = 0
    try:
        _report_progress(trainer, folder)
    except Interrupted:
        print(f"\nstopped at step {trainer.step}; --resume goes on from there", file=sys.stderr)
        status = 128 + (trainer.interrupt.signal or 0)  # as shells report it
    if trainer.is_main:
        base = arguments.base_model or name
        history = settings.history(trainer.step)
        export_forecast(arguments.out, trainer.forecast, settings.geometry, base, history)
        print(f"wrote {arguments.out} (step {trainer.step} of {settings.steps})")
    return status


def _check_files(arguments: argparse.Namespace, folder: Path) -> None:
    """Refuses, before data and model are read, what would fail once the time is spent."""
    from vllm_sparse.training.files import require_writable
    from vllm_sparse.training.trainer import checkpoints

    if arguments.out.suffix != ".safetensors" or arguments.out.is_dir():
        raise ConfigError(
            f"--out {arguments.out}: must be a file whose name ends in .safetensors, by which the "
            "server knows its format"
        )
    if checkpoints(folder) and not arguments.resume:
        raise ConfigError(
            f"{folder} holds checkpoints of an earlier run; add --resume to continue it, or choose "
            "another --folder"
        )
    for place in (arguments.out.parent, folder, arguments.cache):
        if place is not None:
            require_writable(place)


def _warn_of_sparse_forward(model: str, settings: TrainSettings) -> None:
    """Says so if a model that knows only dense attention is to attend sparsely."""
    from vllm_sparse.training.backbone import config_values

    if not settings.sparse_forward or config_values(model).get("sparse_config"):
        return
    print(
        f"warning: sparse_forward is on, as it is by default, but the config of {model} has no "
        f"sparse_config, so it does not say that it was trained sparsely (some releases of "
        "MiniCPM4 were, without). It will attend to the blocks of the teacher "
        f"({settings.teacher}) only, and its Forecast learn what sparse prompts look like "
        "(sparse_prefill). If it was trained densely and prompts are to be dense, use --recipe "
        "dense, or --sparse-forward false and --teacher block-mass",
        file=sys.stderr,
    )


def _prepare(
    arguments: argparse.Namespace, settings: TrainSettings, folder: Path
) -> tuple[Trainer, str]:
    import torch
    from accelerate import Accelerator

    from vllm_sparse.training.backbone import Backbone
    from vllm_sparse.training.forecast import Forecast
    from vllm_sparse.training.samples import CachedSource, SampleSource
    from vllm_sparse.training.trainer import Trainer, checkpoints

    accelerator = Accelerator()
    if accelerator.is_main_process:
        _warn_of_sparse_forward(arguments.model, settings)
    sequences = _sequences(
        arguments,
        settings.seq_len,
        settings.packing,
        settings.text_key,
        settings.max_sequences,
        settings.steps * settings.batch_size,
        accelerator.is_main_process,
    )
    backbone = Backbone.load(arguments.model, settings.dtype, accelerator.device)
    backbone.check_rope()
    backbone.check_sequences(sequences)
    if accelerator.num_processes == 1 and torch.cuda.device_count() > 1:
        accelerator.print(
            f"One of {torch.cuda.device_count()} GPUs is used; torchrun would use all"
        )
    accelerator.print(
        f"{backbone.name}: {backbone.num_layers} layers, {backbone.num_heads} query and "
        f"{backbone.num_kv_heads} KV heads; {len(sequences)} sequences of {settings.seq_len} tokens"
    )
    source: Any = SampleSource(
        backbone,
        settings.geometry,
        settings.teacher,
        settings.queries,
        settings.tail_queries,
        settings.sparse_forward,
        settings.chunk,
        settings.seed,
    )
    if arguments.cache:
        source = CachedSource(source, arguments.cache)
    forecast = Forecast(
        backbone.num_layers,
        backbone.hidden_size,
        backbone.num_kv_heads,
        backbone.head_dim,
        settings.bias,
    )
    forecast.initialise(settings.init, backbone, settings.seed, sequences[0])
    trainer = Trainer(settings, backbone, forecast, source, sequences, folder, accelerator)
    existing = checkpoints(folder)
    if existing:
        trainer.resume(existing[-1])
        accelerator.print(f"resumed from {existing[-1].name}")
    return trainer, backbone.name


def _report_progress(trainer: Trainer, folder: Path) -> None:
    """Trains with a progress bar, and with TensorBoard if it is installed."""
    from tqdm import tqdm

    board = _tensorboard(folder) if trainer.is_main else None
    steps = trainer.settings.steps
    options = {"initial": trainer.step, "total": steps, "disable": not trainer.is_main}
    with tqdm(unit="step", **options) as bar:
        entry: StepLog
        for entry in trainer.train():
            bar.update()
            bar.set_postfix(loss=f"{entry.loss:.4f}", norm=f"{entry.gradient_norm:.2f}")
            if board is not None:
                board.add_scalar("loss", entry.loss, entry.step)
                board.add_scalar("gradient norm", entry.gradient_norm, entry.step)
                board.add_scalar("learning rate", entry.lr, entry.step)
    if board is not None:
        board.close()


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


def _evaluate(arguments: argparse.Namespace) -> int:
    """Prints the table; writes JSON and a plot if asked to."""
    import dataclasses

    from accelerate import Accelerator

    from vllm_sparse.training.backbone import Backbone
    from vllm_sparse.training.evaluate import Evaluation, plot
    from vllm_sparse.training.files import import_forecast
    from vllm_sparse.training.geometry import BlockGeometry

    backbone = Backbone.load(arguments.model, arguments.dtype, Accelerator().device)
    forecast, geometry = None, BlockGeometry()
    if arguments.forecast:
        forecast, geometry = import_forecast(arguments.forecast, backbone)
    given = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(BlockGeometry)
        if getattr(arguments, field.name) is not None
    }
    geometry = dataclasses.replace(geometry, **given)
    geometry.require_length(arguments.seq_len)
    sequences = _sequences(
        arguments,
        arguments.seq_len,
        arguments.packing,
        arguments.text_key,
        None,
        arguments.sequences,
    )
    backbone.check_sequences(sequences)
    count = min(arguments.sequences, len(sequences))
    spread = [len(sequences) * index // count for index in range(count)]
    evaluation = Evaluation(
        backbone,
        geometry,
        forecast,
        arguments.queries,
        arguments.tail_queries,
        seed=arguments.seed,
    )
    report = evaluation.run(sequences[spread])
    print(report.table())
    if arguments.json:
        settings = {
            "model": backbone.name,
            "forecast": arguments.forecast.name if arguments.forecast else None,
            "data": [Path(source).name for source in arguments.data],
            "seq_len": arguments.seq_len,
            "sequences": count,
            **dataclasses.asdict(geometry),
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({**settings, **report.as_dict()}, indent=1) + "\n")
    if arguments.plot and not plot(report, arguments.plot):
        print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    """Prints the metadata and the tensors of a Forecast file."""
    from vllm_sparse.training.files import load_tensors

    tensors, metadata = load_tensors(arguments.file)
    for name, value in sorted(metadata.items()):
        print(f"{name}: {value}")
    parameters = sum(tensor.numel() for tensor in tensors.values())
    print(f"parameters: {parameters:,} in {len(tensors)} tensors")
    for name, tensor in tensors.items():
        norm = float(tensor.float().norm())
        print(f"  {name}  {list(tensor.shape)}  {str(tensor.dtype)[6:]}  norm {norm:.3f}")
    return 0
