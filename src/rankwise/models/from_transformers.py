"""Networks of transformers by model type or class, built from a configuration, never downloaded.

`transformers:gpt2` is the class with the usual head of that type (causal language model, image
classifier, ...); `transformers:GPT2Model` is a class by name.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.models.entry import CLASSIFICATION, LANGUAGE, OTHER, Model
from rankwise.models.reference import Reference, check_image, check_name, load

# Which head a model type gets: an encoder of text also has a causal form, and CLIP a classifier.
_HEADS = (
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "CAUSAL_LM",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "IMAGE_TEXT_TO_TEXT",
)
_TASKS = {"IMAGE_CLASSIFICATION": CLASSIFICATION, "CAUSAL_LM": LANGUAGE}
# Of an example: some configurations allow a million tokens; recurrent ones step through each.
MOST_TOKENS, FEW_TOKENS = 2048, 128


def names(reference: Reference) -> list[str]:
    """Every model type that transformers can build, and every class."""
    auto = _auto(reference)
    return [*sorted(auto.CONFIG_MAPPING_NAMES), *sorted(_classes(auto))]


def find(reference: Reference) -> Model:
    """The entry of a network of transformers.

    Raises:
        OptionError: transformers is missing, or knows no such type, class or configuration key.
    """
    auto = _auto(reference)
    classes = _classes(auto)
    check_name(reference, {*auto.CONFIG_MAPPING_NAMES, *classes})
    kind = classes.get(reference.name, reference.name)
    architecture = reference.name if reference.name in classes else _usual(reference, auto)
    config = _configure(reference, kind)
    network: Any = getattr(sys.modules["transformers"], architecture)
    task = _task(auto, architecture)
    shape = _input_shape(network, config)
    outputs = _outputs(task, config)

    def make(wanted: int, asked: tuple[int, ...]) -> nn.Module:
        changed = _adapt(reference, config, task, (wanted, outputs), (asked, shape))
        return _build(reference, network, changed, task)

    return Model(
        description=f"{architecture} of transformers",
        make=make,
        task=task,
        classes=outputs,
        input_shape=shape,
        example=functools.partial(_example, network, config),
    )


def _auto(reference: Reference) -> Any:
    """The module with transformers' names of types and classes."""
    load(reference)
    hide_broken_torchvision()
    return load(reference, "models.auto.modeling_auto")


_COUNT_FROM_PADDING = frozenset(
    {
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "longformer",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)  # their first position is the one after the padding token's id


@functools.cache
def hide_broken_torchvision() -> None:
    """Let transformers do without a torchvision that was built for another torch.

    It imports torchvision wherever it finds it, for networks of text too, and such a one raises at
    import. Call it before the first class of transformers is used; it does nothing where
    torchvision works or is missing.
    """
    if "torchvision" in sys.modules:
        return
    try:
        import torchvision  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return
    except (RuntimeError, OSError, AttributeError):  # by which of its parts does not fit this torch
        from transformers.utils.import_utils import is_torchvision_available

        hidden: Any = sys.modules
        hidden["torchvision"] = None
        is_torchvision_available.cache_clear()
        is_torchvision_available()  # this answer is kept for good
        del hidden["torchvision"]


def _classes(auto: Any) -> dict[str, str]:
    """Class of a network -> model type, from the tables of transformers' auto classes."""
    found: dict[str, str] = {}
    for table in vars(auto):
        if table.startswith("MODEL_") and table.endswith("MAPPING_NAMES"):
            for kind, entry in getattr(auto, table).items():
                for name in (entry,) if isinstance(entry, str) else entry or ():
                    found.setdefault(name, kind)
    return found


def _table(auto: Any, head: str) -> Mapping[str, Any]:
    return getattr(auto, f"MODEL_FOR_{head}_MAPPING_NAMES", {})


def _usual(reference: Reference, auto: Any) -> str:
    for table in (*(_table(auto, head) for head in _HEADS), auto.MODEL_MAPPING_NAMES):
        if reference.name in table:
            entry = table[reference.name]
            return entry if isinstance(entry, str) else entry[0]
    raise reference.error("has a configuration but no network that can be built from it alone")


def _task(auto: Any, architecture: str) -> str:
    for head, task in _TASKS.items():
        for entry in _table(auto, head).values():
            if architecture == entry or (not isinstance(entry, str) and architecture in entry):
                return task
    return OTHER


def _configure(reference: Reference, kind: str) -> Any:
    """The configuration of a model type with the overrides in it, also in nested ones."""
    from transformers import AutoConfig

    usual = AutoConfig.for_model(kind)
    reference.check(_fields(usual))
    given: dict[str, Any] = {}
    for key, value in reference.overrides.items():
        *outer, last = key.split(".")
        place = given
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = value
    if "use_cache" in _fields(usual):
        given.setdefault("use_cache", False)  # of generation: training has no use for it
    with reference.building():
        return AutoConfig.for_model(kind, **given)


def _fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """What a configuration can be told: key -> default; None where other types are right too."""
    found: dict[str, Any] = {}
    declared = [field.name for field in dataclasses.fields(config)]
    for name in (*declared, *config.attribute_map, "num_labels"):
        value = getattr(config, name, None)
        if hasattr(value, "attribute_map") and dataclasses.is_dataclass(value):
            found |= _fields(value, f"{prefix}{name}.")
        else:
            # Its own validation knows the types, unions among them; the switches it lets pass.
            found[prefix + name] = value if isinstance(value, bool) else None
    return found


def _input_shape(network: Any, config: Any) -> tuple[int, ...]:
    """Shape of the main input, without the batch dimension."""
    main = network.main_input_name
    if main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        side = getattr(vision, "image_size", None) or 224
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        return (getattr(vision, "num_channels", 3), height, width)
    if main == "input_features":
        return (config.num_mel_bins, 2 * config.max_source_positions)  # the encoder halves it
    if main == "input_values":
        mel = getattr(config, "num_mel_bins", None)
        return (16_000,) if mel is None else (config.max_length, mel)  # a second, or a spectrogram
    text = getattr(config, "text_config", config)
    longest = getattr(text, "max_position_embeddings", None) or 0
    if config.model_type in _COUNT_FROM_PADDING:
        longest -= config.pad_token_id + 1
    return (min(longest, MOST_TOKENS) if longest > 0 else FEW_TOKENS,)


def _outputs(task: str, config: Any) -> int:
    if task == CLASSIFICATION:
        return config.num_labels
    text = getattr(config, "text_config", config)
    return getattr(text, "vocab_size", None) or getattr(config, "num_labels", 1)


def _adapt(
    reference: Reference,
    config: Any,
    task: str,
    outputs: tuple[int, int],
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> Any:
    """The configuration for the outputs and the input shape wanted; each beside the usual one."""
    wanted: dict[str, Any] = {}
    shape, usual = shapes
    if outputs[0] != outputs[1]:
        if task == OTHER:
            raise reference.error(f"no number of outputs can be set from outside ({outputs[0]})")
        wanted["num_labels" if task == CLASSIFICATION else "vocab_size"] = outputs[0]
    if shape != usual and task == CLASSIFICATION:
        check_image(reference, shape)
        wanted |= {"num_channels": shape[0]} if shape[0] != usual[0] else {}
        if hasattr(config, "image_size") and shape[1:] != usual[1:]:
            wanted["image_size"] = shape[1] if shape[1] == shape[2] else list(shape[1:])
    elif len(shape) != len(usual):
        raise reference.error(f"reads inputs of shape {usual}, not {shape}; give as many numbers")
    elif task == LANGUAGE and shape[0] > (getattr(config, "max_position_embeddings", None) or 1e9):
        wanted["max_position_embeddings"] = shape[0]
    reference.settle(wanted)
    changed = copy.deepcopy(config)
    for key, value in wanted.items():
        setattr(changed, key, value)
    return changed


def _build(reference: Reference, network: Any, config: Any, task: str) -> nn.Module:
    with reference.building():
        model = network(config)
    if task != OTHER:
        model.register_forward_hook(_logits)
    return model


def _logits(model: nn.Module, args: Any, output: Any) -> Tensor:
    # A hook and not a wrapper: layers keep the names that they have in the user's own program.
    return output.logits


def _example(network: Any, config: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """One of each thing that the forward reads: token ids, an image, audio, a decoder's tokens."""
    main = network.main_input_name
    tokens = main == "input_ids"
    found: dict[str, Any] = {}
    found[main] = torch.zeros(1, *shape, dtype=torch.int64 if tokens else torch.float32)
    taken = inspect.signature(network.forward).parameters
    if config.is_encoder_decoder and "decoder_input_ids" in taken:
        longest = getattr(config, "max_target_positions", None) or MOST_TOKENS
        length = min(shape[0], longest) if tokens else longest
        found["decoder_input_ids"] = torch.zeros(1, length, dtype=torch.int64)
    text, vision = (getattr(config, part, None) for part in ("text_config", "vision_config"))
    if tokens and vision is not None and text is not None and "pixel_values" in taken:
        side = vision.image_size
        found["pixel_values"] = torch.zeros(1, vision.num_channels, side, side)
    if "past_key_values" in taken and (not config.is_encoder_decoder or not tokens):
        # Without a cache the mask of these depends on values, which meta tensors do not have.
        found["use_cache"] = True
    return found
