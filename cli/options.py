"""Options that several commands share, and how a command is written.

A command is a function that takes arguments and request objects, calls one function of the packages below, and prints.
Under ``unpack``, a parameter whose type is a frozen dataclass stands for that dataclass's fields: each field becomes
an option, and the command is called with the finished object. A dataclass in ``cli/`` holds its options itself, as
``Annotated[int, typer.Option(...)]``. A dataclass of ``runtime/`` or ``engines/`` does not import typer, so a table of
options stands at the parameter: ``request: Annotated[ImageRequest, {"steps": typer.Option(...)}, "Image"]``. A field
that the table leaves out keeps its default. The text after the table names the panel of the help page. Types and
defaults come from the dataclass; ``tuple[X, ...]`` is an option that may be repeated; ``parser=`` converts a text to an
object. Modules of such dataclasses import nothing heavy, because ``--help`` loads them. ``run`` in ``cli/images.py`` is
the example to copy.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo, ParameterInfo

Model = Annotated[str, typer.Argument(help="Hub id, directory of a diffusers pipeline, or directory of a bare UNet.")]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle directory that offcut build wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts, and nothing else on standard output.")]
Precision = Annotated[
    str, typer.Option(help="Precision of the graphs: fp32, fp16 or bf16. fp16 and bf16 can cost image quality.")
]
Opset = Annotated[int | None, typer.Option(help="ONNX opset; by default the one that suits the engine best.")]
Fix = Annotated[
    str | None,
    typer.Option(
        metavar="NAME=SIZE,...",
        help="Fix dimensions of the inputs: batch, frames, height and width (of the latent), sequence.",
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        help="Give the graphs the inputs of controlnet or t2i-adapter; repeat for both. "
        "By default a bundle has those that the model's own pipeline uses.",
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[:SCALE]", help="LoRA file in kohya, diffusers or PEFT format; repeatable."),
]
IPAdapters = Annotated[
    list[str] | None,
    typer.Option(
        "--ip-adapter",
        metavar="FILE[:SCALE[:IMAGES]]",
        help="IP-Adapter weights (safetensors) to build in; repeatable.",
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        help="cross-frame, for Text2Video-Zero: each frame attends to the first. "
        "By default a bundle has what the model's own pipeline uses."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Variant = Annotated[str | None, typer.Option(help="Variant of the weight files, e.g. fp16.")]
Subfolder = Annotated[str | None, typer.Option(help="Subfolder of the UNet inside the model; 'unet' in a pipeline.")]
Cuts = Annotated[list[str] | None, typer.Option("--cut", help="deepcache:K, paper:K or mlperf; repeatable.")]
EngineName = Annotated[str, typer.Option("--engine", help="Engine to run: auto, or a name that offcut doctor lists.")]
Device = Annotated[str, typer.Option(help="Device: cpu, or cuda as PyTorch spells it.")]
Provider = Annotated[
    str | None,
    typer.Option(
        help="ONNX Runtime's provider on cuda: cuda, tensorrt or tensorrt-rtx. The TensorRT ones compile first."
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads of a CPU engine; by default one per core.")]


@dataclasses.dataclass(frozen=True)
class EngineChoice:
    """The engine to open, and where."""

    engine: EngineName = "auto"
    device: Device = "cpu"
    provider: Provider = None
    threads: Threads = None


def unpack(command: Callable[..., None]) -> Callable[..., None]:
    """Return a function for typer that has an option for each field of the dataclasses that ``command`` takes.

    Where a field's name is taken already, its parameter gets the prefix of the command's parameter; name its option
    explicitly then.

    Raises:
        TypeError: a table names a field that the dataclass does not have.
    """
    parameters: dict[str, inspect.Parameter] = {}
    requests: dict[str, tuple[type[Any], dict[str, str]]] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        request, *extras = get_args(parameter.annotation) or (parameter.annotation,)
        if not dataclasses.is_dataclass(request):
            parameters[name] = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            continue
        fields = _parameters(request, *extras)
        names = {field: field if field not in parameters else f"{name}_{field}" for field in fields}
        parameters |= {names[field]: option.replace(name=names[field]) for field, option in fields.items()}
        requests[name] = (request, names)

    @functools.wraps(command)
    def run(**values: Any) -> None:
        built = {
            name: request(**{field: _immutable(values.pop(option)) for field, option in names.items()})
            for name, (request, names) in requests.items()
        }
        command(**values, **built)

    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return run


def _parameters(request: type[Any], *extras: Mapping[str, ParameterInfo] | str) -> dict[str, inspect.Parameter]:
    """Return the fields of a dataclass that have an option, as keyword parameters that typer reads."""
    table = next((extra for extra in extras if isinstance(extra, Mapping)), None)
    panel = next((extra for extra in extras if isinstance(extra, str)), None)
    hints = get_type_hints(request, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(request)}
    if unknown := (table or {}).keys() - fields.keys():
        raise TypeError(f"{request.__name__} has no field {', '.join(unknown)}")
    parameters = {}
    for name in fields if table is None else table:
        kind, *infos = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
        info = copy.copy(infos[0] if table is None else table[name])
        if isinstance(info, OptionInfo):
            info.rich_help_panel = info.rich_help_panel or panel
        default = _default(fields[name])
        if get_origin(kind) is tuple and get_args(kind)[1:] == (...,):
            kind = list[get_args(kind)[0]]  # type: ignore[misc]
        parameters[name] = inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
        )
    return parameters


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


def _immutable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
