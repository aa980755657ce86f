"""What a stage is given: the run's folder, its config, the mesh, models by name, seeds, progress and metrics."""

import dataclasses
import functools
import hashlib
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from almost_jax.config import ExperimentConfig
from almost_jax.core.heads import HEAD, head_axes
from almost_jax.core.llama import LlamaConfig, Params, logical_axes, unstack_layers
from almost_jax.core.partitioning import make_sampling_mesh, shardings
from almost_jax.core.train import is_matrix
from almost_jax.errors import InputError
from almost_jax.io.distributed import from_primary
from almost_jax.io.metrics import MetricsLogger
from almost_jax.io.models import Model, load_model
from almost_jax.io.progress import ProgressHook, ProgressReport, console_progress


@functools.partial(jax.jit, static_argnames="config")
def _sampled_from(params: Params, config: LlamaConfig) -> Params:
    """Layers unrolled, matrices in the compute dtype, vectors (scales, a scalar head) as they are."""
    flat = unstack_layers(params, config.num_layers) if config.scan_layers else params
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(config.dtype) if is_matrix(path) else leaf, flat
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """One run directory and what its stages share.

    Attributes:
        directory: the run's folder; stages write nowhere else.
        config: the resolved experiment.
        mesh: all devices, arranged as the config says.
        tensorboard: whether metrics also go to `directory/tensorboard`.
        console: where lines and bars go.
        on_progress: called as a stage advances.
    """

    directory: Path
    config: ExperimentConfig
    mesh: Mesh
    tensorboard: bool
    console: Console
    on_progress: ProgressHook | None = None
    _loaded: dict[str, Model] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def path(self, *parts: str) -> Path:
        """A path inside the run's folder."""
        return self.directory.joinpath(*parts)

    def exists(self, *parts: str) -> bool:
        """Whether there is something at a path inside the run's folder, as process 0 sees it."""
        return from_primary(lambda: self.path(*parts).exists())

    def seed(self, name: str) -> int:
        """A seed in [0, 2**31) of its own for `name`, from the experiment's seed."""
        digest = hashlib.sha256(f"{self.config.seed}/{name}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    @cached_property
    def sampling_mesh(self) -> Mesh:
        """The devices of `mesh`, arranged as `mesh.sampling` says; `mesh` itself where it says nothing.

        Raises:
            InputError: they can't be arranged so.
        """
        settings = self.config.mesh.sampling
        if settings is None:
            return self.mesh
        try:
            return make_sampling_mesh(settings, list(self.mesh.devices.flat))
        except ValueError as error:
            raise InputError(str(error)) from error

    def model(self, name: str) -> Model:
        """The model that the config calls `name`, to sample and score with, on `sampling_mesh`.

        The one loaded last is kept, and given again unless its arrays were donated to a training step meanwhile.

        Raises:
            InputError: the config has no model of that name, or its source can't be loaded.
        """
        return self._kept(name, self.sampling_mesh)

    def model_to_train(self, name: str) -> Model:
        """The model that the config calls `name` on `mesh`, with float32 parameters; see `model`."""
        return self._kept(name, self.mesh)

    def load(self, *parts: str) -> Model:
        """A model that lies in the run's folder, to sample and score with, on `sampling_mesh`.

        Raises:
            InputError: it can't be loaded.
        """
        return self._loaded_onto(str(self.path(*parts)), self.sampling_mesh)

    def to_sample(self, params: Params, config: LlamaConfig) -> tuple[Params, LlamaConfig]:
        """Parameters that are trained, and their config, where and as `sampling_mesh` samples from them.

        A mesh of its own has layers unrolled (a scan would hold the cache twice) and matrices in the compute dtype, in
        which they are multiplied anyway.
        """
        if self.config.mesh.sampling is None:
            return params, config
        flat = dataclasses.replace(config, scan_layers=False)
        placement = shardings({**logical_axes(flat), **(head_axes() if HEAD in params else {})}, self.sampling_mesh)
        return jax.device_put(_sampled_from(params, config), placement), flat

    def _kept(self, name: str, mesh: Mesh) -> Model:
        if name not in self.config.models:
            raise InputError(f"models: there is no model {name!r}; the experiment has {', '.join(self.config.models)}")
        key = name if mesh is self.mesh else f"{name} to sample"
        kept = self._loaded.get(key)
        if kept is not None and not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept.params)):
            return kept
        # Two large models need not fit: let the last one go before the next one comes.
        self._loaded.clear()
        del kept
        self._loaded[key] = self._loaded_onto(self.config.models[name], mesh)
        return self._loaded[key]

    def _loaded_onto(self, source: str, mesh: Mesh) -> Model:
        found = load_model(source, mesh, self.config.compute_dtype)
        if mesh is self.mesh:
            return found
        params, config = self.to_sample(found.params, found.config)
        return dataclasses.replace(found, params=params, config=config)

    def progress(self, description: str, total: int, done: int = 0) -> AbstractContextManager[ProgressReport]:
        """`console_progress` on the run's console, told to `on_progress` too."""
        return console_progress(self.console, description, total, done, self.on_progress)

    def metrics(self, stage: str, resume_step: int, logged: int | None = None) -> MetricsLogger:
        """The logger of `stage/metrics.jsonl`, cut back to `resume_step`; TensorBoard too when asked for.

        It is said when the file ends before the step `logged`, as where a folder was copied while a run wrote to it.
        """
        tensorboard = self.path("tensorboard", stage) if self.tensorboard else None
        logger = MetricsLogger(self.path(stage, "metrics.jsonl"), resume_step, tensorboard)
        if logged is not None and (found := logger.sync()) < logged:
            self.say(
                f"{stage}: {logger.path} ends at step {found}, but step {logged} was logged before the checkpoint of "
                f"step {resume_step}: the figures behind step {found} are lost; training goes on"
            )
        return logger

    def say(self, line: Any) -> None:
        """Print one line as it is (no markup, no wrapping)."""
        self.console.print(str(line), markup=False, highlight=False, emoji=False, soft_wrap=True)
