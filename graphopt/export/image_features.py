"""The vision part of a vision-language model: what it is fed, and where the projected features of its images appear.

`get_image_features` of a transformers model often ends by taking its features apart image by image, with a number of
pieces that no trace holds. What is exported ends at the module whose result these pieces are views of.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.errors import UsageError, first_line
from graphopt.export.dependencies import quiet, require
from graphopt.export.dry_run import dry_run, used
from graphopt.export.packed_images import attending, patch_facts
from graphopt.export.sample_inputs import floats
from graphopt.export.sized_source import Columns, tensors
from graphopt.export.source import Input
from graphopt.export.traceable import Reached, traceable

GRID = "image_grid_thw"
"""The input of models that take images of any sizes: int64 [images, 3], frames, rows and columns of patches."""
MASK = "pixel_attention_mask"
"""The input that says which pixels are an image and which are padding."""


@dataclass(frozen=True)
class ImageFeatures:
    """How image features are computed.

    Attributes:
        inputs: pixel_values first.
        sizes: Of each dynamic dimension its sizes in the sample and in the probes.
        call: Gives (features,) from the inputs; the last dimension of the features is the width of the language model.
        parts: The modules that run: the vision tower, a projector.
    """

    inputs: list[Input]
    sizes: Columns
    call: Callable[..., tuple[Any]]
    parts: list[Any]


def image_features(label: str, module: Any, image: tuple[int, int] | None = None) -> ImageFeatures:
    """How the image features of a vision-language model are computed.

    Args:
        label: What messages call the model.
        module: The transformers model.
        image: Height and width of its images, where the configuration doesn't tell them.

    Raises:
        UsageError: It can't be derived; the message says what.
    """
    owner = module.base_model if hasattr(module.base_model, "get_image_features") else module
    if not hasattr(owner, "get_image_features"):
        raise UsageError(
            f"{label}: {type(module).__name__} has no get_image_features, so its vision part isn't known; write a "
            "function that returns that part and its example inputs, and export module:function"
        )
    return _Vision(label, module, owner, image).features()


Form = tuple[list[Input], Columns]
"""Inputs and their sizes."""


class _Vision:
    def __init__(self, label: str, module: Any, owner: Any, image: tuple[int, int] | None) -> None:
        self.label, self.module, self.owner, self.image = label, module, owner, image
        self.method = owner.get_image_features
        self.parameters = inspect.signature(self.method).parameters
        config = module.config
        self.config = getattr(config, "vision_config", None) or getattr(config, "vision", config)
        self.width = module.get_input_embeddings().weight.shape[-1]

    def features(self) -> ImageFeatures:
        """The first form of images that the model takes."""
        refused = ""
        for inputs, sizes in self._forms():
            given = tensors(inputs, sizes)
            try:
                last, parts = self._last_module(inputs, sizes)
            except UsageError:
                raise
            except Exception as error:
                refused = refused or first_line(error)
                continue
            call = self._call(inputs, last)
            kept = used(self.module, call, given)
            inputs = [item for item, counts in zip(inputs, kept, strict=True) if counts]
            return ImageFeatures(inputs, sizes, self._call(inputs, last), parts)
        raise UsageError(
            f"{self.label}: {type(self.module).__name__} doesn't run on images alone ({refused}); write a function "
            "that returns its vision part and its example inputs, and export module:function"
        )

    # ---- forms of images

    def _forms(self) -> list[Form]:
        needed = [name for name, p in self.parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        if unknown := [name for name in needed if name not in ("pixel_values", GRID, MASK)]:
            raise UsageError(
                f"{self.label}: {type(self.module).__name__} needs {', '.join(unknown)} for the features of its "
                "images, whose numbers decide how these are put together; write a function that returns its vision "
                "part and its example inputs, and export module:function"
            )
        if GRID in self.parameters:
            return [self._packed()]
        height, width = self.image or self._image_size()
        channels = getattr(self.config, "num_channels", None) or 3
        pixels = (channels, height, width)
        images: dict[str, tuple[int, ...]] = {"images": (2, 1, 3)}
        several: dict[str, tuple[int, ...]] = {"batch": (2, 1, 3), "images": (3, 2, 1)}
        forms: list[Form] = []
        for lead, sizes in ((("images",), images), (("batch", "images"), several)):
            inputs = [Input("pixel_values", (*lead, *pixels), floats(self.module.dtype))]
            if MASK in self.parameters:
                inputs.append(Input(MASK, (*lead, height, width), _image_mask))
            forms.append((inputs, sizes))
        return forms

    def _image_size(self) -> tuple[int, int]:
        size = getattr(self.config, "image_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, list | tuple) and len(size) == 2:
            return int(size[0]), int(size[1])
        raise UsageError(f"{self.label}: its vision_config doesn't tell the size of its images (image_size)")

    def _packed(self) -> Form:
        """All images in one row of patches, with the grid of each."""
        merge = self._merge()
        images = (2, 1, 3)
        sizes = {"images": images, "patches": tuple(6 * merge**2 * count for count in images)}
        pixels = Input("pixel_values", ("patches", self._patch_numbers()), floats(self.module.dtype))
        return [pixels, Input(GRID, ("images", 3), _grids(merge))], sizes

    def _merge(self) -> int:
        return int(getattr(self.config, "spatial_merge_size", 1))

    def _window(self) -> int | None:
        """Side of the windows of attention, in blocks of patches."""
        pixels = getattr(self.config, "window_size", None)
        return None if pixels is None else int(pixels) // self._merge() // int(self.config.patch_size)

    def _patch_numbers(self) -> int:
        """Numbers in one patch: what the tower's first layer takes."""
        torch = require("torch")
        towers = [part for part in self.owner.modules() if type(getattr(part, "config", None)) is type(self.config)]
        for layer in towers[0].modules() if towers else ():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Conv3d):
                return int(layer.weight[0].numel())
            if isinstance(layer, torch.nn.Linear):
                return int(layer.in_features)
        raise UsageError(f"{self.label}: the layers of its vision part don't tell the size of a patch")

    # ---- running

    @contextlib.contextmanager
    def _arguments(self, inputs: Sequence[Input], args: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """The arguments of get_image_features."""
        given = {item.name: tensor for item, tensor in zip(inputs, args, strict=True)}
        if GRID not in given:
            yield given
            return
        facts = patch_facts(given[GRID], given["pixel_values"].shape[0], self._merge(), self._window())
        with attending(self.config):
            yield given | {f"image_{name}": fact for name, fact in facts.items()}

    def _call(self, inputs: Sequence[Input], last: Any) -> Callable[..., tuple[Any]]:
        """Features by the modules up to `last`; None: by the whole method."""

        def call(*args: Any) -> tuple[Any]:
            with self._arguments(inputs, args) as given, traceable() as context:
                if last is None:
                    return (_features(self.method(**given)),)
                handle = last.register_forward_hook(lambda *called: setattr(context, "result", _features(called[-1])))
                try:
                    self.method(**given)
                except Reached as reached:
                    return (reached.result,)
                finally:
                    handle.remove()
            raise RuntimeError(f"{type(last).__name__} doesn't run")

        return call

    def _last_module(self, inputs: Sequence[Input], sizes: Columns) -> tuple[Any, list[Any]]:
        """The module whose result is the features (None: the method gives them whole), and the modules that run."""

        def run(*args: Any) -> tuple[Any, list[tuple[Any, Any]], list[Any]]:
            with self._arguments(inputs, args) as given, traceable() as context, self._watched() as (made, ran):
                result = self.method(**given)
            selected.append(context.selected)
            return result, made, ran

        selected: list[bool] = []
        few = tensors(inputs, sizes, 1)
        try:
            result, made, ran = dry_run(self.module, run, tensors(inputs, sizes))
        except ValueError as error:
            if "decides by numbers" not in str(error):
                raise
            # It takes the features apart by numbers at the end: a run with numbers shows what it takes apart.
            with require("torch").no_grad(), quiet():
                result, made, ran = run(*few)
        self._require_plain(result)
        whole = _features(result)
        last = self._owner_of(whole, made) if isinstance(whole, list) else None
        if any(selected):
            self._require_all_selected(inputs, few, last)
        return last, ran

    def _require_all_selected(self, inputs: Sequence[Input], few: Sequence[Any], last: Any) -> None:
        """Masks that leave out padding leave out nothing of images without: see `traceable`."""
        with require("torch").no_grad(), quiet():
            with self._arguments(inputs, few) as given:
                plain = _features(self.method(**given))
            (ours,) = self._call(inputs, last)(*few)
        pieces = plain if isinstance(plain, list) else [plain]
        if sum(piece.numel() for piece in pieces) != ours.numel():
            raise UsageError(
                f"{self.label}: {type(self.module).__name__} chooses by numbers which features of its images it keeps, "
                "which no trace holds; write a function that returns its vision part and its example inputs, and "
                "export module:function"
            )

    @contextlib.contextmanager
    def _watched(self) -> Iterator[tuple[list[tuple[Any, Any]], list[Any]]]:
        """Collect the modules with the features that they give, and the outermost modules that run."""
        made: list[tuple[Any, Any]] = []
        ran: list[Any] = []
        depth = 0

        def before(part: Any, *_: Any) -> None:
            nonlocal depth
            if depth == 0 and not any(part is other for other in ran):
                ran.append(part)
            depth += 1

        def after(part: Any, _: Any, output: Any) -> None:
            nonlocal depth
            depth -= 1
            features = _features(output)
            if isinstance(features, require("torch").Tensor):
                made.append((part, features))

        handles = []
        for part in self.owner.modules():
            if part is not self.owner:
                handles.append(part.register_forward_pre_hook(before))
                handles.append(part.register_forward_hook(after))
        try:
            yield made, ran
        finally:
            for handle in handles:
                handle.remove()

    def _owner_of(self, pieces: list[Any], made: list[tuple[Any, Any]]) -> Any:
        """The last module of whose result the pieces are views, all of it."""
        for part, features in reversed(made):
            same = all(_storage(piece) == _storage(features) for piece in pieces)
            if same and sum(piece.numel() for piece in pieces) == features.numel():
                return part
        raise UsageError(
            f"{self.label}: {type(self.module).__name__} puts the features of its images together from numbers outside "
            "of its modules, which no trace holds; write a function that returns its vision part and its example "
            "inputs, and export module:function"
        )

    def _require_plain(self, result: Any) -> None:
        """No features for deeper layers, which the decoder would have to be fed too."""
        torch = require("torch")
        known = {"last_hidden_state", "pooler_output", "hidden_states", "attentions"}
        fields = dict(result) if isinstance(result, Mapping) else {}
        # Whole results of parts (a vision tower, a resampler) are there for those who are curious.
        more = [key for key, value in fields.items() if key not in known and not isinstance(value, Mapping)]
        if more:
            raise UsageError(
                f"{self.label}: {type(self.module).__name__} hands its language model more than the features of its "
                f"images ({', '.join(more)}), which can't be exported as parts"
            )
        found = _features(result)
        pieces = found if isinstance(found, list) else [found]
        if not pieces or not all(isinstance(p, torch.Tensor) and p.shape[-1] == self.width for p in pieces):
            raise UsageError(
                f"{self.label}: get_image_features of {type(self.module).__name__} doesn't give features as wide as "
                f"the language model ({self.width})"
            )


def _features(result: Any) -> Any:
    """The features in what a method or a module returns: a tensor, or a list of them; None: there are none."""
    torch = require("torch")
    found = getattr(result, "pooler_output", None)
    found = result if found is None else found
    if isinstance(found, Mapping):
        found = next(iter(found.values()), None)
    if isinstance(found, tuple | list):
        tensors = [item for item in found if isinstance(item, torch.Tensor)]
        return tensors if len(tensors) == len(found) else None
    return found if isinstance(found, torch.Tensor) else None


def _storage(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata)


def _image_mask(shape: tuple[int, ...], _: np.random.Generator) -> Any:
    """bool [..., height, width]: the first image is padded by a quarter below, the second at the right."""
    mask = np.ones((int(np.prod(shape[:-2])), *shape[-2:]), dtype=bool)
    mask[0::3, shape[-2] - shape[-2] // 4 :] = False
    mask[1::3, :, shape[-1] - shape[-1] // 4 :] = False
    return require("torch").from_numpy(mask.reshape(shape))


def _grids(merge: int) -> Callable[[tuple[int, ...], np.random.Generator], Any]:
    """int64 [images, 3]: images of one frame and 6 blocks, in three shapes."""

    def make(shape: tuple[int, ...], _: np.random.Generator) -> Any:
        shapes = np.array([[1, 2 * merge, 3 * merge], [1, 3 * merge, 2 * merge], [1, merge, 6 * merge]])
        return require("torch").from_numpy(shapes[np.arange(shape[0]) % 3].astype(np.int64))

    return make
