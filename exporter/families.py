"""The table of model families: UNet classes that can be exported, and the inputs of their graphs.

A new family is one entry in ``FAMILIES``: the diffusers class, and a function from its config to its inputs. Inputs
have the names that diffusers' ``forward`` and optimum's exporter use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, ShapeError
from . import ip_adapter
from .residuals import ADAPTERS, argument_of, nest
from .specs import TensorSpec

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]

NOISE_PRED = "noise_pred"
FEWEST_FRAMES = 2  # PyTorch traces a symbolic size as at least 2; OpenVINO 2026.4 convolves a single frame wrongly


@dataclass(frozen=True)
class Family:
    """A class of UNets with the same inputs.

    Attributes:
        name: offcut's name of the family, written into the manifest.
        unet_class: class in diffusers, ``_class_name`` in the UNet's config.
        inputs: function from the UNet's config and the latent's dtype to the graph's inputs, with ``sample`` and
            ``timestep`` first.
        nested: inputs that ``forward`` takes inside a dict, each with the name of that dict's argument.
        takes_residuals: whether ControlNets and T2I-Adapters exist for this family.
        takes_attention: whether the UNet's attention may be replaced by one of ``attention.ATTENTION``.
        output_class: class of the result of ``forward``, in the module of the UNet's class.
        positions: names of the third and fourth argument of ``forward``.
        channels: channel axis of the latent.
        frames: function from the config to the number of frames that the UNet was trained for, and the largest number
            that it supports (None for no limit). None for images.
    """

    name: str
    unet_class: str
    inputs: Callable[[Config, str], tuple[TensorSpec, ...]]
    nested: Mapping[str, str] = field(default_factory=dict)
    takes_residuals: bool = False
    takes_attention: bool = False
    output_class: str = "UNet2DConditionOutput"
    positions: tuple[str, str] = ("encoder_hidden_states", "class_labels")
    channels: int = 1
    frames: Callable[[Config], tuple[int, int | None]] | None = None

    def specs(self, config: Config, dtype: str, adapters: Sequence[str] = ()) -> tuple[TensorSpec, ...]:
        """Return the graph's inputs: the UNet's own, then those of the adapters, which are names from ``ADAPTERS``.

        Raises:
            ModelError: an adapter is unknown, or does not exist for this family.
        """
        if unknown := [name for name in adapters if name not in ADAPTERS or not self.takes_residuals]:
            supported = ", ".join(ADAPTERS) if self.takes_residuals else "none"
            raise ModelError(f"a {self.unet_class} takes no adapter called {unknown[0]!r}; it takes {supported}")
        extra = [spec for name in dict.fromkeys(adapters) for spec in ADAPTERS[name](config, dtype)]
        return (*self.inputs(config, dtype), *extra)

    def noise(self, config: Config, dtype: str) -> TensorSpec:
        """Return the spec of the output: the latent's shape with ``out_channels``."""
        shape = list(self.inputs(config, dtype)[0].shape)
        shape[self.channels] = config["out_channels"]
        return TensorSpec(NOISE_PRED, dtype, tuple(shape))

    @property
    def is_video(self) -> bool:
        return self.frames is not None

    def trained_frames(self, config: Config) -> int | None:
        """Return the number of frames that the UNet was trained for, or None for images."""
        return self.frames(config)[0] if self.frames else None

    def check_limits(self, config: Config, dims: Mapping[str, int]) -> None:
        """Check that the UNet and its trace support these sizes.

        Raises:
            ShapeError: a video has too many frames, or a single frame.
        """
        if self.frames is None or "frames" not in dims:
            return
        frames, max_frames = dims["frames"], self.frames(config)[1]
        if frames < FEWEST_FRAMES:
            raise ShapeError(f"a video has at least {FEWEST_FRAMES} frames, not {frames}: make more")
        if max_frames is not None and frames > max_frames:
            raise ShapeError(f"this {self.unet_class} supports at most {max_frames} frames, not {frames}: make fewer")

    def arguments(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return the keyword arguments of the UNet's ``forward`` for these graph inputs."""
        arguments: dict[str, Any] = {}
        for name, tensor in tensors.items():
            if argument_of(name) is not None or ip_adapter.is_embeds(name) or name == ip_adapter.SCALE:
                continue
            if name in self.nested:
                arguments.setdefault(self.nested[name], {})[name] = tensor
            else:
                arguments[name] = tensor
        image_arguments = ip_adapter.nest(tensors)
        if image_arguments:
            image_arguments["added_cond_kwargs"] |= arguments.get("added_cond_kwargs", {})
        return arguments | image_arguments | nest(tensors)


def _latent_inputs(config: Config, dtype: str) -> list[TensorSpec]:
    # The timestep is a vector, so that a batch may hold requests at different steps. It is float32, because some
    # schedulers (Euler with continuous timesteps, flow matching) have fractional timesteps. A learned embedding is a
    # table, so its timesteps are integers.
    timestep = "int64" if config.get("time_embedding_type") == "learned" else "float32"
    return [
        TensorSpec("sample", dtype, ("batch", config["in_channels"], "height", "width")),
        TensorSpec("timestep", timestep, ("batch",)),
    ]


def _unconditional(config: Config, dtype: str) -> tuple[TensorSpec, ...]:
    inputs = _latent_inputs(config, dtype)
    if config["class_embed_type"] is not None:
        raise ModelError(f"class_embed_type={config['class_embed_type']!r} cannot be exported yet")
    if config["num_class_embeds"] is not None:
        inputs.append(TensorSpec("class_labels", "int64", ("batch",)))
    return tuple(inputs)


def _conditional(config: Config, dtype: str) -> tuple[TensorSpec, ...]:
    images = ip_adapter.specs(config, dtype)
    if config["encoder_hid_dim_type"] == ip_adapter.PROJECTION and not images:
        raise ModelError(
            "this UNet was saved with an IP-Adapter in it, which cannot be loaded: save it without "
            "(pipe.unload_ip_adapter()), and build with --ip-adapter FILE"
        )
    inputs = [*_latent_inputs(config, dtype), _text(config, dtype), *_size_conditioning(config, dtype)]
    kind = config["class_embed_type"]
    if kind == "projection":
        width = config["projection_class_embeddings_input_dim"]
        inputs.append(TensorSpec("class_labels", dtype, ("batch", width)))
    elif kind is None and config["num_class_embeds"] is not None:
        inputs.append(TensorSpec("class_labels", "int64", ("batch",)))
    elif kind is not None:
        raise ModelError(f"class_embed_type={kind!r} cannot be exported yet")
    return (*inputs, *_guidance_embedding(config, dtype), *images)


def _image_to_video(config: Config, dtype: str) -> tuple[TensorSpec, ...]:
    # The image is in the last channels of the latent, and its CLIP embedding is the only token.
    count = config["projection_class_embeddings_input_dim"] // config["addition_time_embed_dim"]
    return (
        TensorSpec("sample", dtype, ("batch", "frames", config["in_channels"], "height", "width")),
        TensorSpec("timestep", "float32", ("batch",)),
        TensorSpec("encoder_hidden_states", dtype, ("batch", 1, _text_width(config))),
        TensorSpec("added_time_ids", dtype, ("batch", count)),
    )


def _text_to_video(config: Config, dtype: str) -> tuple[TensorSpec, ...]:
    return (*_video_latents(config, dtype), _text(config, dtype), *_guidance_embedding(config, dtype))


def _motion(config: Config, dtype: str) -> tuple[TensorSpec, ...]:
    # AnimateDiff's pipelines repeat the text for every frame, since prompts may change in the course of a video.
    text = _text(config, dtype, batch="batch*frames")
    sizes = _size_conditioning(config, dtype)
    return (*_video_latents(config, dtype), text, *sizes, *_guidance_embedding(config, dtype))


def _video_latents(config: Config, dtype: str) -> list[TensorSpec]:
    return [
        TensorSpec("sample", dtype, ("batch", config["in_channels"], "frames", "height", "width")),
        TensorSpec("timestep", "float32", ("batch",)),
    ]


def _text(config: Config, dtype: str, batch: str = "batch") -> TensorSpec:
    known = (None, "text_proj", *((ip_adapter.PROJECTION,) if config.get(ip_adapter.CONFIG_KEY) else ()))
    if config.get("encoder_hid_dim_type") not in known:
        raise ModelError(f"encoder_hid_dim_type={config['encoder_hid_dim_type']!r} cannot be exported yet")
    return TensorSpec("encoder_hidden_states", dtype, (batch, "sequence", _text_width(config)))


def _text_width(config: Config) -> int:
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    if not isinstance(width, int) and len(set(width)) == 1:  # one for each block, all equal
        width = width[0]
    if not isinstance(width, int):
        raise ModelError("cross_attention_dim differs from block to block, which offcut cannot export yet")
    return width


def _size_conditioning(config: Config, dtype: str) -> list[TensorSpec]:
    addition = config["addition_embed_type"]
    if addition is None:
        return []
    if addition != "text_time":
        raise ModelError(f"addition_embed_type={addition!r} cannot be exported yet; offcut supports 'text_time' (SDXL)")
    time_ids = _time_ids(config)
    pooled = config["projection_class_embeddings_input_dim"] - time_ids * config["addition_time_embed_dim"]
    return [TensorSpec("text_embeds", dtype, ("batch", pooled)), TensorSpec("time_ids", dtype, ("batch", time_ids))]


def _guidance_embedding(config: Config, dtype: str) -> list[TensorSpec]:
    width = config["time_cond_proj_dim"]
    return [] if width is None else [TensorSpec("timestep_cond", dtype, ("batch", width))]


def _time_ids(config: Config) -> int:
    """Return the number of values in ``time_ids``: 6 sizes and crops in SDXL base, 5 in its refiner.

    The refiner has an aesthetic score in place of the target size. The config only holds the sum of the pooled text
    width and the embedded numbers; the pooled width is 1280 in both models.
    """
    total, width = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
    return 5 if total == 1280 + 5 * width else 6


_ADDED = {"text_embeds": "added_cond_kwargs", "time_ids": "added_cond_kwargs"}

FAMILIES: dict[str, Family] = {
    family.unet_class: family
    for family in (
        Family(
            name="unet2d-condition",
            unet_class="UNet2DConditionModel",
            inputs=_conditional,
            nested=_ADDED,
            takes_residuals=True,
            takes_attention=True,
        ),
        Family(
            name="unet2d",
            unet_class="UNet2DModel",
            inputs=_unconditional,
            output_class="UNet2DOutput",
            positions=("class_labels", "class_labels"),
        ),
        Family(
            name="unet-spatio-temporal",
            unet_class="UNetSpatioTemporalConditionModel",
            inputs=_image_to_video,
            output_class="UNetSpatioTemporalConditionOutput",
            positions=("encoder_hidden_states", "added_time_ids"),
            channels=2,
            frames=lambda config: (config["num_frames"], None),
        ),
        Family(
            name="unet-motion",
            unet_class="UNetMotionModel",
            inputs=_motion,
            nested=_ADDED,
            output_class="UNetMotionOutput",
            positions=("encoder_hidden_states", "timestep_cond"),
            # Motion modules were trained on 16 frames; their sinusoidal positions reach further.
            frames=lambda config: (min(16, config["motion_max_seq_length"]), config["motion_max_seq_length"]),
        ),
        Family(
            name="unet3d-condition",
            unet_class="UNet3DConditionModel",
            inputs=_text_to_video,
            output_class="UNet3DConditionOutput",
            frames=lambda config: (16, None),
        ),
    )
}


def family_of(config: Config) -> Family:
    """Return the family of a UNet with this config.

    Raises:
        ModelError: the UNet's class is not in the table.
    """
    name = config.get("_class_name", "no _class_name")
    if name not in FAMILIES:
        raise ModelError(
            f"{name} is not a UNet class that offcut supports; it exports {', '.join(FAMILIES)} "
            "(transformer models such as Flux and SD3 have no skip connections to cut)"
        )
    return FAMILIES[name]


def downsampling(config: Config) -> int:
    """Return the number that the latent's height and width must be a multiple of."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def example_dims(config: Config, even_batch: bool = False) -> dict[str, int]:
    """Return small dimensions that every graph of this config accepts. All sizes differ, so that no two are confused.

    Args:
        even_batch: whether the batch has two halves, each of several images.
    """
    multiple = downsampling(config)
    dims = {"batch": 10 if even_batch else 2, "height": 2 * multiple, "width": 3 * multiple, "sequence": 7}
    frames = family_of(config).frames
    return dims if frames is None else dims | {"frames": min(5, frames(config)[1] or 5)}


def example_inputs(specs: tuple[TensorSpec, ...], dims: Mapping[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random inputs: normal noise, timesteps from 1 to 999, class labels 0."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for spec in specs:
        shape = spec.resolve(dims)
        if spec.name == "timestep":
            tensors[spec.name] = torch.randint(1, 1000, shape, generator=generator).to(spec.torch_dtype())
        elif spec.dtype == "int64":
            tensors[spec.name] = torch.zeros(shape, dtype=torch.int64)
        else:
            tensors[spec.name] = torch.randn(shape, generator=generator).to(spec.torch_dtype())
    return tensors
