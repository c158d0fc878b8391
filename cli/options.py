"""Options that several commands share, and ``unpack``, which turns dataclasses into options.

A command is a function that takes arguments and dataclasses, calls one function of the packages below, and prints.
``unpack`` replaces each parameter whose type is a frozen dataclass by one option for each field, and calls the command
with the finished object.

- A dataclass in ``cli/`` declares its options in its fields, as ``Annotated[int, typer.Option(...)]``.
- A dataclass of ``runtime/`` or ``engines/`` does not import typer. The parameter has a table of options instead:
  ``request: Annotated[ImageRequest, {"steps": typer.Option(...)}, "Image"]``. A field that is not in the table has no
  option and keeps its default. The text after the table is the title of the panel on the help page.

Types and defaults come from the dataclass. A field of type ``tuple[X, ...]`` becomes a repeatable option, and
``parser=`` converts a text to an object. Modules of such dataclasses import nothing heavy, because ``--help`` loads
them. ``run`` in ``cli/images.py`` is the example to copy.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo, ParameterInfo

from ..errors import UserError

if TYPE_CHECKING:
    from ..engines.bundle.bundle import Bundle

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
        help="Add inputs for a controlnet or t2i-adapter to the graphs; repeat for both. "
        "By default the inputs that the model's own pipeline uses.",
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
        help="Attention to build in: cross-frame, for Text2Video-Zero, where each frame attends to the first. "
        "By default the attention that the model's own pipeline uses."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Variant = Annotated[str | None, typer.Option(help="Variant of the weight files, e.g. fp16.")]
Subfolder = Annotated[str | None, typer.Option(help="Subfolder of the UNet inside the model; 'unet' in a pipeline.")]
Cuts = Annotated[
    list[str] | None, typer.Option("--cut", help="Cut to build: deepcache:K, paper:K or mlperf; repeatable.")
]
EngineName = Annotated[str, typer.Option("--engine", help="Engine to run: auto, or a name that offcut doctor lists.")]
Device = Annotated[str, typer.Option(help="Device as PyTorch spells it, e.g. cpu or cuda:1.")]
Provider = Annotated[
    str | None,
    typer.Option(
        help="ONNX Runtime's provider on cuda: cuda, tensorrt or tensorrt-rtx. The TensorRT providers compile first."
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads of a CPU engine; by default one per core.", min=1)]


@dataclasses.dataclass(frozen=True)
class EngineChoice:
    """Engine to open, and the device and settings to open it with."""

    engine: EngineName = "auto"
    device: Device = "cpu"
    provider: Provider = None
    threads: Threads = None


@dataclasses.dataclass(frozen=True)
class Origin:
    """How a bundle shows where it comes from."""

    expect_digest: Annotated[
        str | None, typer.Option(help="Fail if the bundle has another digest than the one that its build printed.")
    ] = None
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Open compiled engines, which are code, although the bundle was built elsewhere."),
    ] = False

    def open(self, bundle: Path) -> Bundle:
        """Open a bundle; see ``Bundle.open``."""
        from ..engines.bundle.bundle import Bundle

        return Bundle.open(bundle, self.expect_digest, trust=self.trust)


class StrictCommand(TyperCommand):
    """Command that refuses an option given twice, unless the option is a list, and numbers that are not finite.

    click would take the last value, and pass on ``nan`` and ``inf``.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = itertools.takewhile(lambda token: token != "--", args)
        counts = Counter(token.partition("=")[0] for token in options if token.startswith("-"))
        for parameter in self.params:
            names = [*parameter.opts, *parameter.secondary_opts]
            if parameter.param_type_name == "option" and not parameter.multiple and sum(counts[n] for n in names) > 1:
                raise UserError(f"{parameter.opts[-1]} is given twice, but takes one value: leave one out")
        left = super().parse_args(ctx, args)
        for parameter in self.params:
            value = ctx.params.get(parameter.name)
            values = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(number, float) and not math.isfinite(number) for number in values):
                raise UserError(f"{parameter.opts[-1]} takes a finite number, not {value}")
        return left


def unpack(command: Callable[..., None]) -> Callable[..., None]:
    """Return a function for typer that has an option for each field of the dataclasses that ``command`` takes.

    If another parameter has a field's name, the field's parameter is called ``<command's parameter>_<field>``; give its
    option an explicit name then.

    Raises:
        TypeError: a table names a field that the dataclass does not have.
    """
    parameters: dict[str, inspect.Parameter] = {}
    groups: dict[str, tuple[type[Any], dict[str, str]]] = {}  # dataclass, and parameter names by field
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        kind, *extras = get_args(parameter.annotation) or (parameter.annotation,)
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            parameters[name] = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            continue
        fields = _field_parameters(kind, *extras)
        names = {field: field if field not in parameters else f"{name}_{field}" for field in fields}
        parameters |= {names[field]: option.replace(name=names[field]) for field, option in fields.items()}
        groups[name] = (kind, names)

    @functools.wraps(command)
    def call_with_dataclasses(**values: Any) -> None:
        objects = {
            name: kind(**{field: _list_to_tuple(values.pop(option)) for field, option in names.items()})
            for name, (kind, names) in groups.items()
        }
        command(**values, **objects)

    signature = inspect.Signature(list(parameters.values()))
    call_with_dataclasses.__signature__ = signature  # type: ignore[attr-defined]
    call_with_dataclasses.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return call_with_dataclasses


def _field_parameters(dataclass: type[Any], *extras: Mapping[str, ParameterInfo] | str) -> dict[str, inspect.Parameter]:
    """Return the fields of a dataclass that have an option, as keyword parameters that typer reads."""
    table = next((extra for extra in extras if isinstance(extra, Mapping)), None)
    panel = next((extra for extra in extras if isinstance(extra, str)), None)
    hints = get_type_hints(dataclass, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(dataclass)}
    if unknown := (table or {}).keys() - fields.keys():
        raise TypeError(f"{dataclass.__name__} has no field {', '.join(unknown)}")
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


def _list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
