"""The engine's programs, compiled ahead of time: one for each shape, in a process once, on disk where jax keeps them.

On an accelerator the layout of the cache is left to the compiler: the decode program is compiled first with
`Layout.AUTO` on the cache that it is given and gives back, and every other program takes and gives what it chose. With
a layout of our own choosing a TPU would copy the whole cache in and out at every call.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from almost_jax.core.llama import Cache, LlamaConfig, Params, Prefix, Prompts, empty_cache, prefill_prefix
from almost_jax.core.partitioning import partition_spec, row_parts, rules_for
from almost_jax.sampling import sampler
from almost_jax.sampling.rules import SamplingRules
from almost_jax.sampling.sampler import Drawn, Slots

# A tree of shapes, dtypes and places in a form that can be hashed.
_Shapes: TypeAlias = tuple[Any, tuple[Any, ...]]

# Programs that a process keeps at hand; more than a run has shapes.
_KEPT = 128


@dataclasses.dataclass(frozen=True)
class Place:
    """Where arrays live: a mesh of several devices, or one device."""

    mesh: Mesh | None
    device: jax.Device

    @property
    def platform(self) -> str:
        """Of its devices: "cpu", "gpu" or "tpu"."""
        return self.device.platform

    @property
    def rows(self) -> int:
        """The number of parts into which a batch's rows are split."""
        return 1 if self.mesh is None else row_parts(self.mesh)

    def sharding(self, *axes: str | None) -> jax.sharding.Sharding:
        """Of an array whose dimensions have these logical names."""
        if self.mesh is None:
            return SingleDeviceSharding(self.device)
        return NamedSharding(self.mesh, partition_spec(axes, rules_for(self.mesh)))

    @property
    def whole(self) -> jax.sharding.Sharding:
        """A copy on every device."""
        return self.sharding() if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def put(self, array: np.ndarray) -> jax.Array:
        """The same array on every device, of every host."""
        return jax.device_put(array, self.whole)


def place_of(params: Params) -> Place:
    """Where a model's parameters are."""
    leaf = jax.tree.leaves(params)[0]
    sharding = leaf.sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None
    return Place(mesh if isinstance(mesh, Mesh) else None, min(leaf.devices(), key=lambda device: device.id))


class Programs:
    """The programs that sample from one model by one set of rules.

    `compile_seconds` counts what this object had to wait for compilation, from disk too; `compiled` the programs.
    """

    def __init__(self, params: Params, config: LlamaConfig, rules: SamplingRules):
        """For a tree in the layout that `config` says."""
        self.params, self.config = params, config
        # Limits are each request's own, so programs don't depend on them.
        self.rules = dataclasses.replace(rules, max_new_tokens=1)
        self.place = place_of(params)
        self.compile_seconds = 0.0
        self.compiled = 0
        # A small part of what the last program gave, which is there when the program is done.
        self._latest: Any = None
        self._shapes = _shapes(params)
        self._ready: dict[tuple[Any, ...], Any] = {}
        self._formats = _Static(None)

    def prefix(self, tokens: np.ndarray) -> Prefix:
        """`llama.prefill_prefix`: tokens [P]."""
        arguments = self.params, self.place.put(tokens)
        found: Prefix = self._call(("prefix", tokens.shape), _compiled_prefix, arguments, self.config)
        return found

    def empty_slots(
        self, batch: int, size: int, prefix: Prefix | None, prompts: Prompts | None, steps: int
    ) -> Slots:
        """`sampler.empty_slots`, laid out as `decode` wants it."""
        self._formats = self._wanted(batch, size, prefix, prompts, steps)
        shape = "slots", batch, size, self._formats
        slots: Slots = self._call(shape, _compiled_slots, (), self.config, batch, size, self._formats)
        return slots

    def prefill(
        self, tokens: np.ndarray, num_tokens: np.ndarray, kept: Cache | None, prefix: Prefix | None
    ) -> tuple[jax.Array, Cache]:
        """`sampler.prefill`; `kept` is donated."""
        arguments = self.params, self.place.put(tokens), self.place.put(num_tokens), kept, prefix
        shape = "prefill", tokens.shape, None if kept is None else room(kept), _width(prefix)
        found: tuple[jax.Array, Cache] = self._call(shape, _compiled_prefill, arguments, self.config)
        return found

    def admit(
        self,
        slots: Slots,
        read: tuple[jax.Array, Cache],
        rows: np.ndarray,
        places: np.ndarray,
        keys: jax.Array,
        limits: np.ndarray,
        copies: bool,
    ) -> tuple[Slots, jax.Array, jax.Array]:
        """`sampler.admit`."""
        arguments = slots, read, self.place.put(rows), self.place.put(places), keys, self.place.put(limits)
        shapes = slots.last.shape, room(slots.cache), read[0].shape, room(read[1]), rows.shape
        shape = "admit", *shapes, copies, self._formats
        found: tuple[Slots, jax.Array, jax.Array] = self._call(
            shape, _compiled_admit, arguments, self.rules, copies, self._formats
        )
        return found

    def keys(self, root: np.ndarray, words: np.ndarray) -> jax.Array:
        """`sampler.request_keys`, whole on every device."""
        arguments = self.place.put(root), self.place.put(words)
        found: jax.Array = self._call(("keys", words.shape), _compiled_keys, arguments)
        return found

    def decode(
        self, slots: Slots, prefix: Prefix | None, prompts: Prompts | None, steps: int
    ) -> tuple[Slots, Drawn]:
        """`sampler.decode`."""
        arguments = self.params, slots, prefix, prompts
        shape = "decode", slots.last.shape, room(slots.cache), _width(prefix), _size(prompts), steps, self._formats
        found: tuple[Slots, Drawn] = self._call(
            shape, _compiled_decode, arguments, self.config, steps, self.rules, self._formats
        )
        return found

    def halt(self, slots: Slots, places: np.ndarray) -> Slots:
        """`sampler.halt`."""
        arguments = slots, self.place.put(places)
        shape = "halt", slots.last.shape, room(slots.cache), self._formats
        found: Slots = self._call(shape, _compiled_halt, arguments, self._formats)
        return found

    def grow(
        self, slots: Slots, size: int, prefix: Prefix | None, prompts: Prompts | None, steps: int
    ) -> Slots:
        """`sampler.grow`, laid out as `decode` wants it."""
        self._formats = self._wanted(slots.last.shape[0], size, prefix, prompts, steps)
        shape = "grow", slots.last.shape, room(slots.cache), size, _layout(slots.cache), self._formats
        found: Slots = self._call(shape, _compiled_grow, (slots,), size, self._formats)
        return found

    def empty_cache(self, rows: int, size: int) -> Cache:
        """`llama.empty_cache`."""
        found: Cache = self._call(("cache", rows, size), _compiled_cache, (), self.config, rows, size)
        return found

    def restore(
        self, cache: Cache, kept: Cache, rows: np.ndarray, places: np.ndarray, lengths: np.ndarray
    ) -> Cache:
        """`sampler.restore`."""
        arguments = cache, kept, *(self.place.put(array) for array in (rows, places, lengths))
        # What is kept of slots lies as those do.
        layout = _layout(kept)
        shape = "restore", cache.lengths.shape, room(cache), kept.lengths.shape, room(kept), rows.shape, layout
        found: Cache = self._call(shape, _compiled_restore, arguments, self.config)
        return found

    def _wanted(
        self, batch: int, size: int, prefix: Prefix | None, prompts: Prompts | None, steps: int
    ) -> "_Static":
        """How slots of a shape lie in memory: as the decode program wants them."""
        where = _slots_shardings(self.config, self.place)
        if self.place.platform == "cpu":
            return _Static(where)
        tree = jax.eval_shape(lambda: sampler.empty_slots(self.config, batch, size))
        formats = _Static(jax.tree.map(lambda leaf, s: Format(Layout.AUTO, s) if leaf.ndim > 2 else s, tree, where))
        placed = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, where)
        program = self._program(
            ("layout", batch, size, _width(prefix), _size(prompts), steps),
            _compiled_decode, (self.params, placed, prefix, prompts), self.config, steps, self.rules, formats,
        )  # fmt: skip
        return _Static(program.input_formats[0][1])

    def _call(self, shape: tuple[Any, ...], make: Callable[..., Any], arguments: tuple[Any, ...], *static: Any) -> Any:
        """What the program for arguments of a shape gives back."""
        program = self._program(shape, make, arguments, *static)
        self._latest = None
        given = program(*arguments)
        self._latest = min(jax.tree.leaves(given), key=lambda leaf: leaf.size)
        return given

    def _program(
        self, shape: tuple[Any, ...], make: Callable[..., Any], arguments: tuple[Any, ...], *static: Any
    ) -> Any:
        """The program for arguments of a shape, of which `shape` says all that can differ between two calls."""
        found = self._ready.get(shape)
        if found is None:
            # What the device does meanwhile would not be counted as anything.
            jax.block_until_ready(self._latest)
            start = time.perf_counter()
            shapes = tuple(self._shapes if one is self.params else _shapes(one) for one in arguments)
            found = self._ready[shape] = make(shapes, self.place, *static)
            self.compile_seconds += time.perf_counter() - start
            self.compiled += 1
        return found


def room(cache: Cache) -> int:
    """S, the tokens that each row of a cache has room for."""
    return int(jax.tree.leaves(cache.keys)[0].shape[-1])


def _layout(cache: Cache) -> Any:
    """How a cache's keys lie in memory: the compiler may have chosen for slots."""
    return jax.tree.leaves(cache.keys)[0].format


def _size(prompts: Prompts | None) -> tuple[int, ...]:
    return () if prompts is None else (*prompts.members.shape, room(prompts.cache))


def _width(prefix: Prefix | None) -> int:
    return 0 if prefix is None else prefix.length


class _Static:
    """A tree of shardings or formats that is compared by its leaves, so that it can be part of a key."""

    def __init__(self, tree: Any):
        self.tree = tree
        leaves, structure = jax.tree.flatten(tree, is_leaf=lambda leaf: isinstance(leaf, Format))
        self._key = (structure, tuple(leaves))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._key == other._key


def _shapes(tree: Any) -> _Shapes:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple(
        (leaf.shape, leaf.dtype, leaf.format if hasattr(leaf, "format") else leaf.sharding) for leaf in leaves
    )


def _abstract(shapes: _Shapes) -> Any:
    structure, leaves = shapes
    return jax.tree.unflatten(
        structure, [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype, where in leaves]
    )


def _compile(
    function: Callable[..., Any], shapes: tuple[_Shapes, ...], place: Place, outputs: Any, donated: tuple[int, ...] = ()
) -> Any:
    """Compile for these arguments, results placed as `outputs` says; the mesh is the one that holds the arrays."""
    jitted = jax.jit(function, donate_argnums=donated, out_shardings=outputs)
    if place.mesh is None:
        return jitted.lower(*map(_abstract, shapes)).compile()
    with jax.set_mesh(place.mesh):
        return jitted.lower(*map(_abstract, shapes)).compile()


def _cache_shardings(config: LlamaConfig, place: Place) -> Cache:
    heads: str | None = "activation_kv_heads"
    if place.mesh is not None and config.num_kv_heads % place.mesh.shape["tensor"]:
        heads = None
    axes = ("rows", heads, None, None)
    one = place.sharding(None, *axes) if config.scan_layers else place.sharding(*axes)
    leaves: Any = one if config.scan_layers else (one,) * config.num_layers
    row: Any = place.sharding("rows")
    return Cache(leaves, leaves, row)


def _slots_shardings(config: LlamaConfig, place: Place) -> Slots:
    row: Any = place.sharding("rows")
    pair: Any = place.sharding("rows", None)
    return Slots(_cache_shardings(config, place), last=row, keys=pair, drawn=row, limits=row, running=row)


@functools.lru_cache(maxsize=_KEPT)
def _compiled_prefix(shapes: Any, place: Place, config: LlamaConfig) -> Any:
    # A prefix is one copy for all rows, on every device whole but for its heads.
    cache = _cache_shardings(config, place)

    def heads(leaf: Any) -> Any:
        if place.mesh is None:
            return leaf
        spec = list(leaf.spec)
        del spec[-4]
        return NamedSharding(place.mesh, PartitionSpec(*spec))

    outputs = Prefix(jax.tree.map(heads, cache.keys), jax.tree.map(heads, cache.values))
    return _compile(lambda params, tokens: prefill_prefix(params, config, tokens), shapes, place, outputs)


@functools.lru_cache(maxsize=_KEPT)
def _compiled_slots(shapes: Any, place: Place, config: LlamaConfig, batch: int, size: int, formats: _Static) -> Any:
    return _compile(lambda: sampler.empty_slots(config, batch, size), shapes, place, formats.tree)


@functools.lru_cache(maxsize=_KEPT)
def _compiled_cache(shapes: Any, place: Place, config: LlamaConfig, rows: int, size: int) -> Any:
    return _compile(lambda: empty_cache(config, rows, size), shapes, place, _cache_shardings(config, place))


@functools.lru_cache(maxsize=_KEPT)
def _compiled_prefill(shapes: Any, place: Place, config: LlamaConfig) -> Any:
    outputs = place.sharding("rows", None), _cache_shardings(config, place)
    return _compile(
        lambda params, tokens, n, kept, prefix: sampler.prefill(params, config, tokens, n, kept, prefix),
        shapes, place, outputs, (3,),
    )  # fmt: skip


@functools.lru_cache(maxsize=_KEPT)
def _compiled_admit(shapes: Any, place: Place, rules: SamplingRules, copies: bool, formats: _Static) -> Any:
    outputs = formats.tree, place.whole, place.whole
    return _compile(functools.partial(sampler.admit, rules=rules, copies=copies), shapes, place, outputs, (0,))


@functools.lru_cache(maxsize=_KEPT)
def _compiled_decode(
    shapes: Any, place: Place, config: LlamaConfig, steps: int, rules: SamplingRules, formats: _Static
) -> Any:
    whole: Any = place.whole
    outputs = formats.tree, Drawn(whole, whole, whole, whole)

    def function(
        params: Params, slots: Slots, prefix: Prefix | None, prompts: Prompts | None
    ) -> tuple[Slots, Drawn]:
        return sampler.decode(params, config, slots, prefix, prompts, steps, rules)

    automatic = any(
        isinstance(leaf, Format) and leaf.layout is Layout.AUTO
        for leaf in jax.tree.leaves(formats.tree, is_leaf=lambda leaf: isinstance(leaf, Format))
    )
    if not automatic:
        return _compile(function, shapes, place, outputs, (1,))
    arguments = [_abstract(one) for one in shapes]
    jitted = jax.jit(
        function, donate_argnums=1,
        in_shardings=(_places(shapes[0]), formats.tree, _places(shapes[2]), _places(shapes[3])),
        out_shardings=outputs,
    )  # fmt: skip
    if place.mesh is None:
        return jitted.lower(*arguments).compile()
    with jax.set_mesh(place.mesh):
        return jitted.lower(*arguments).compile()


def _places(shapes: _Shapes) -> Any:
    structure, leaves = shapes
    return jax.tree.unflatten(structure, [where for _, _, where in leaves])


@functools.lru_cache(maxsize=_KEPT)
def _compiled_keys(shapes: Any, place: Place) -> Any:
    return _compile(sampler.request_keys, shapes, place, place.whole)


@functools.lru_cache(maxsize=_KEPT)
def _compiled_halt(shapes: Any, place: Place, formats: _Static) -> Any:
    return _compile(sampler.halt, shapes, place, formats.tree, (0,))


@functools.lru_cache(maxsize=_KEPT)
def _compiled_grow(shapes: Any, place: Place, size: int, formats: _Static) -> Any:
    return _compile(lambda slots: sampler.grow(slots, size), shapes, place, formats.tree)


@functools.lru_cache(maxsize=_KEPT)
def _compiled_restore(shapes: Any, place: Place, config: LlamaConfig) -> Any:
    return _compile(sampler.restore, shapes, place, _cache_shardings(config, place), (0,))
