"""Where each parameter lies in the tensors of a checkpoint: names, order of axes, rows of shared tensors."""

import math
from typing import Any

import jax
import numpy as np

from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.models.hf.families import FAMILIES, MULTIMODAL, Weight


class Layout:
    """How one parameter's axes lie in its tensors, which may hold other parameters' rows too.

    Attributes:
        path: of the parameter, such as "layers/attention/query".
        shape: of the parameter.
        stacked: whether its first axis is L, of which each layer is a tensor of its own.
        names: of its tensors, one for each layer, or the one.
        start: the first of its rows in such a tensor.
        own_shape: of its rows there.
    """

    def __init__(
        self, path: str, weight: Weight, letters: str, shape: tuple[int, ...], of_model: dict[str, int]
    ):
        names = letters.split()
        self.path, self.shape = path, shape
        self.sizes = dict(zip(names, shape, strict=True))
        self.stacked = names[0] == "L"
        self.inner = names[1:] if self.stacked else names
        self.groups = weight.axes.split()
        self.order = "".join(self.groups)
        self.start = sum(math.prod(of_model[n] for n in group) for group in weight.before.split())
        self.own_shape = tuple(math.prod(self.sizes[n] for n in group) for group in self.groups)
        layers = range(self.sizes["L"]) if self.stacked else range(1)
        self.names = [weight.name.format(layer=layer) for layer in layers]

    def cut(self, tensor: Any, index: tuple[slice, ...]) -> np.ndarray:
        """The part of one file tensor at `index` of the parameter's axes (less L), as the file has it.

        A view, its axes apart but in the file's order; `turned` puts them into the parameter's.
        """
        ranges = {n: s.indices(self.sizes[n])[:2] for n, s in zip(self.inner, index, strict=True)}
        slices: list[slice] = []
        for group in self.groups:
            first, rest = group[0], group[1:]
            # a shard never splits the later letters of a group: heads are split, not their widths
            width = int(np.prod([self.sizes[n] for n in rest], dtype=int))
            assert all(ranges[n] == (0, self.sizes[n]) for n in rest)
            start = 0 if slices else self.start
            slices.append(slice(start + ranges[first][0] * width, start + ranges[first][1] * width))
        return tensor[tuple(slices)].reshape([ranges[n][1] - ranges[n][0] for n in self.order])

    def turned(self, part: np.ndarray) -> np.ndarray:
        """A view of what `cut` gave, or of a stack of such, with the axes in the parameter's order."""
        front = part.ndim - len(self.inner)
        return part.transpose([*range(front), *(front + self.order.index(n) for n in self.inner)])

    def to_file(self, values: np.ndarray) -> np.ndarray:
        """Values of the parameter (less L), or its first rows where no axes trade places, as in the file."""
        values = values.transpose([self.inner.index(n) for n in self.order])
        return values.reshape(-1, *self.own_shape[1:])


def layouts(model: Model) -> dict[str, Layout]:
    """Parameter path -> its layout."""
    table = FAMILIES[model.config.architecture].weights
    letters, shapes = flat(model.letters), flat(model.abstract())
    sizes: dict[str, int] = {}
    for path, shape in shapes.items():
        sizes |= dict(zip(letters[path].split(), shape.shape, strict=True))
    return {path: Layout(path, table[path], letters[path], shapes[path].shape, sizes) for path in shapes}


def tensor_shapes(layouts: dict[str, Layout]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor; one that several parameters share has the rows of all."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layout in layouts.values():
        rows = layout.start + layout.own_shape[0]
        for name in layout.names:
            rows_so_far = shapes.get(name, (0,))[0]
            shapes[name] = (max(rows_so_far, rows), *layout.own_shape[1:])
    return shapes


def pieces(layouts: dict[str, Layout]) -> dict[str, list[tuple[Layout, int]]]:
    """Name -> the parameters and the layer whose rows it holds, in the order of the rows."""
    found: dict[str, list[tuple[Layout, int]]] = {name: [] for name in tensor_shapes(layouts)}
    for layout in sorted(layouts.values(), key=lambda layout: layout.start):
        for layer, name in enumerate(layout.names):
            found[name].append((layout, layer))
    return found


def own_name(model: Model, name: str) -> str | None:
    """The name that a stored tensor has in the language model alone; None for one that is not part of it."""
    if model.config.multimodal is None:
        return name
    if name.startswith(MULTIMODAL[model.config.multimodal].other_tensors):
        return None
    for prefix, own in (("language_model.", ""), ("model.language_model.", "model.")):
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name


def flat(tree: Params) -> dict[str, Any]:
    """A nested dict -> path "layers/attention/query" -> leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
