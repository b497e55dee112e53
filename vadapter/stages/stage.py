"""One stage of a recipe on a mesh: what it computes, what would stop it, and its parameters."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax

from vadapter.config import plain, with_defaults, with_new_keys
from vadapter.data.batch import EOS
from vadapter.data.config import DataConfig
from vadapter.data.example import Source
from vadapter.data.image_transform import ImageTransform
from vadapter.data.open import make_source, make_stream, prompt_len
from vadapter.data.pipeline import require_usable
from vadapter.data.tokenizers import Tokenizer
from vadapter.distributed import hosts, memory
from vadapter.distributed.compile import jit
from vadapter.distributed.mesh import batch_sharding, shardings_of, with_mesh
from vadapter.distributed.preemption import Stop
from vadapter.errors import ConfigError, Problems, UserError
from vadapter.io import results
from vadapter.models.decoding import Decode
from vadapter.models.registry import expand, load_kind
from vadapter.recipe import schema
from vadapter.recipe.optim import make_optimizer
from vadapter.recipe.schema import DTYPES, STAGES, Recipe, StageConfig
from vadapter.stages import initialization
from vadapter.stages import outline as outlines
from vadapter.stages.outline import Outline

if TYPE_CHECKING:
    from vadapter.models.adapter_model import AdapterModel
    from vadapter.stages import steps
    from vadapter.stages.abstract_state import Initializer, Model
    from vadapter.stages.flow import Shapes

K = TypeVar("K")
T = TypeVar("T")

NO_RUN = Path("RUN")  # a run directory where none is given: nothing is finished there
PROMPT = 8  # P without a tokenizer: "Describe the following:" is 4 to 7 tokens in most vocabularies

# What the identity of a stage leaves out of its section, and of those of its data sets.
_NO_CONFIG = (*StageConfig.FREE, "start")
_NO_DATA = ("source", "cache_dir")

Earlier = dict[str, dict[str, Any]]  # stage -> component -> tree of shapes


def once(results: dict[K, T | UserError], key: K, make: Callable[[], T]) -> T:
    """Return `make()`, called once per key; a UserError that it raises is raised every time."""
    if key not in results:
        try:
            results[key] = make()
        except UserError as error:
            results[key] = error
    result = results[key]
    if isinstance(result, UserError):
        raise result
    return result


class Sources:
    """The data sets of a recipe, each opened once; one that cannot be opened keeps its error."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self._opened: dict[str, Source | UserError] = {}

    def __call__(self, name: str) -> Source:
        """Return the source of a data set, or raise what is wrong with it."""
        return once(self._opened, name, lambda: make_source(name, self._recipe.data[name]))


class Findings:
    """Results of `Stage.check`, from shapes and headers, by name of a data set or a component."""

    def __init__(self):
        self.built = False  #: the model can be built; if not, only `sources` are filled in
        self.sources: dict[str, Source] = {}  #: of the data sets that can be opened
        self.rows: dict[str, Shapes] = {}  #: shapes of a batch of one row of a data set
        #: shapes of a component's input and output, for the largest of the rows
        self.flow: dict[str, tuple[Any, Any]] = {}
        self.starts: dict[str, initialization.Start] = {}  #: of the components that have one
        #: bytes on each device that stay allocated while it trains, by component or use
        self.memory: dict[str, int] = {}


class Stage:
    """One stage of a recipe on a mesh; `train`, `check`, `plan`, `eval` and the hub all use it.

    It has three faces:

    * static: the model, and the shapes and shardings of all that its train step reads and writes.
      Needs the recipe alone and does no I/O, so the devices need not exist either.
    * check: `check` collects whatever would stop the stage later. Reads headers, no tensors.
    * load: `load_params` returns the parameters that it starts from; those that it ended with are
      in `params` if it comes from `restore.open_run`.

    Everything is made when first used and kept: a model is built once and its init traced once.
    What only building it or training needs is imported there: a process that uses a trained stage
    whose outline and program are kept, see `io.results`, loads no model code.

    Args:
      mesh: of devices that are present, or of a topology that is not.
      workdir: the run directory.
      tokenizer: of its language model; None: not trained yet, or of no interest.
      vocab_size: V, or an upper bound without a tokenizer; 0: the tokenizer's.
      source: opens a data set; by default each is opened once for this stage alone.
      stop: interrupts long computations.

    Attributes:
      config: the stage's section of the recipe.
      directory: of the stage in the run directory.
      activity: what it is doing, for error messages.
    """

    def __init__(
        self, recipe: Recipe, name: str, mesh: jax.sharding.Mesh, *, workdir: Path = NO_RUN,
        tokenizer: Tokenizer | None = None, vocab_size: int = 0,
        source: Callable[[str], Source] | None = None, stop: Stop | None = None,
    ):  # fmt: skip
        self.recipe, self.name, self.mesh, self.workdir = recipe, name, mesh, workdir
        self.config: StageConfig = recipe.stages[name]
        self.directory = workdir / name
        self.activity = "before its first step"
        self.source = source or Sources(recipe)
        self.stop = stop or Stop()
        self.params: dict[str, Any] = {}  #: of a restored stage, of every component
        self.step = 0  #: of a restored stage, number of steps that `params` were trained for
        self.digests: dict[str, str] = {}  #: of a restored stage, of its frozen components
        self._tokenizer = tokenizer
        self._features: dict[tuple[str, str], Source] = {}  # of a data set and an encoder's digest
        self.vocab_size = vocab_size or (tokenizer or recipe.tokenizer).vocab_size

    @property
    def exact(self) -> bool:
        """Whether it has its tokenizer; without one, numbers of tokens are upper bounds."""
        return self._tokenizer is not None

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; without one, a stand-in over bytes that gives the most tokens."""
        if self._tokenizer is None:
            from vadapter.data.tokenizers.bpe import BPETokenizer

            return BPETokenizer.train(["a"], 259)
        return self._tokenizer

    # -- static --------------------------------------------------------------------------------

    @functools.cached_property
    def initializer(self) -> "Initializer":
        """The model with its traced init."""
        from vadapter.recipe.model import make_model
        from vadapter.stages.abstract_state import Initializer

        return Initializer(make_model(self.recipe, self.config, self.vocab_size))

    @property
    def model(self) -> "Model":
        """The model of the stage."""
        return self.initializer.model

    @property
    def adapter_model(self) -> "AdapterModel":
        """The model of a stage that predicts text with a language model: any kind but `vision`."""
        from vadapter.models.adapter_model import AdapterModel

        assert isinstance(self.model, AdapterModel), f"stage {self.name} has no language model"
        return self.model

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """All that the model follows from, as a JSON value."""
        return outlines.facts(self.recipe, self.config, self.vocab_size)

    @functools.cached_property
    def _known(self) -> Outline | None:
        """The outline that an earlier process has kept."""
        return outlines.kept(self.facts)

    @functools.cached_property
    def outline(self) -> Outline:
        """What is known of the model without building it; traces its init if it is not kept."""
        if self._known is not None:
            return self._known
        made = self.initializer.outline()
        outlines.keep(self.facts, made)
        return made

    @property
    def view(self) -> ImageTransform | None:
        """The transform of the encoder's images; None for text only."""
        if self._known is not None:
            return self._known.view
        from vadapter.stages.abstract_state import view_of

        return view_of(self.model)

    @property
    def captions(self) -> bool:
        """Whether the stage writes text about images."""
        return self.view is not None and self.config.kind != "vision"

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the components that it trains."""
        return schema.trained(self.config)

    def data(self) -> tuple[str, ...]:
        """Return the data sets that it trains on, measures losses on and evaluates on."""
        return schema.used_data(self.recipe, self.config)

    def on(self, mesh: jax.sharding.Mesh, *, batch: int = 0, remat: str = "") -> "Stage":
        """Return the stage on another mesh, with another batch size or rematerialization."""
        recipe = schema.resized(self.recipe, self.name, batch=batch, remat=remat)
        other = Stage(
            recipe, self.name, mesh, workdir=self.workdir, tokenizer=self._tokenizer,
            vocab_size=self.vocab_size, source=self.source, stop=self.stop,
        )  # fmt: skip
        if not remat:  # the same model
            other.initializer = self.initializer
        return other

    @functools.cached_property
    def abstract(self) -> dict[str, Any]:
        """Component -> tree of `jax.ShapeDtypeStruct` with shardings, in the dtype it is stored."""
        return self.outline.shapes(self.mesh)

    def abstract_params(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (trained, frozen) shapes as on the devices: frozen ones in compute dtype."""
        from vadapter.stages.abstract_state import in_compute_dtype
        from vadapter.stages.steps import split

        trainable, frozen = split(self.abstract, self.trained)
        return trainable, in_compute_dtype(frozen, DTYPES[self.recipe.dtype])

    @functools.cached_property
    def tx(self) -> Any:
        """The optimizer of the trained components."""
        return make_optimizer(self.config.optim, self.config.steps)

    @functools.cached_property
    def abstract_state(self) -> Any:
        """Shapes and shardings of the train state."""
        from vadapter.stages.abstract_state import abstract_state

        return abstract_state(self.abstract_params()[0], self.tx, self.mesh)

    def sizes(self, data: str = "", *, kind: str = "", prompt: int = PROMPT) -> dict[str, int]:
        """Return P, T and M of the rows of a data set, and F and S where the stage sees images.

        By default of the first data set that it trains on, and of images where it does not say.
        """
        rows = self.recipe.data[data or next(iter(self.config.data))]
        sizes = {"P": prompt, "T": rows.text_len, "M": rows.target_len or rows.text_len}
        if rows.task == "document":
            sizes["P"] = 0
        if self.view is not None:
            clip = (kind or rows.media) == "clip"
            sizes |= {"F": rows.frames if clip else 1, "S": rows.view(self.view).size}
        return sizes

    def batch_shapes(self, data: str = "") -> "Shapes":
        """Return the shapes of a batch of a data set, with shardings."""
        from vadapter.stages.abstract_state import row_shapes

        return row_shapes(self.sizes(data), self.config.batch, batch_sharding(self.mesh))

    def arguments(self, data: str = "") -> tuple[Any, Any, Any]:
        """Return (state, frozen, batch) of the train step, as shapes with shardings."""
        return self.abstract_state, self.abstract_params()[1], self.batch_shapes(data)

    @property
    def objective(self) -> "steps.Objective":
        """The loss that it minimizes."""
        from vadapter.models.coca import CoCa
        from vadapter.stages.steps import CaptionObjective, CocaObjective

        if isinstance(self.model, CoCa):
            return CocaObjective(self.model)
        return CaptionObjective(self.model, self.config.chunk_rows, self.config.query_loss)

    @functools.cached_property
    def train_step(self) -> Callable[..., Any]:
        """The train step, (state, frozen, batch) -> (state, metrics), see `steps`; not compiled."""
        from vadapter.models.transformer import with_runs
        from vadapter.stages.steps import make_train_step

        step = make_train_step(
            self.objective, self.tx, seed=self.recipe.seed, accumulate=self.config.accumulate,
            dropout=self.config.use_dropout,
        )  # fmt: skip
        return with_mesh(self.mesh, with_runs(self._runs(), step))

    def _runs(self) -> float:
        """Return how often a CPU will run a layer in one program; 0 for other devices.

        There is a program for every shape of rows.
        """
        if self.mesh.devices.flat[0].platform != "cpu":
            return 0
        programs = {tuple(self.sizes(name).values()) for name in self.config.data}
        return self.config.steps * self.config.accumulate / max(len(programs), 1)

    def jit_train_step(self, step: Callable[..., Any] | None = None, jit: Any = jax.jit) -> Any:
        """Return the train step, or a function around it, jitted: it reuses the state's memory."""
        out = (shardings_of(self.abstract_state), None)
        return jit(step or self.train_step, donate_argnums=0, out_shardings=out)

    def decode(self, how: Decode) -> Callable[..., Any]:
        """Return the function that generates: (params of all components, batch) -> generations."""
        from vadapter.models.generate import decode

        fn = functools.partial(decode, self.adapter_model, how=how, stop=(EOS,))
        return with_mesh(self.mesh, fn)

    # -- check ---------------------------------------------------------------------------------

    def check(self, earlier: Earlier, problems: Problems, limit: int | None = None) -> Findings:
        """Collect everything that would stop the stage in `problems`, from shapes and headers.

        No tensor is read, nothing is computed on a device and nothing is written. `earlier` has the
        components that stages before this one will have trained; this one adds its own. Programs
        may use `limit` bytes on a device; None: unknown.
        """
        from vadapter.stages.flow import check_batch_size, flow, shape_errors

        findings, section = Findings(), f"stages.{self.name}"
        with problems.gather(self.name), shape_errors(f"{section}: its model cannot be built"):
            findings.built = bool(self.abstract)
        with problems.gather(self.name):
            check_batch_size(self.name, self.config, self.mesh.size)
        for name in self.data():
            with problems.gather(self.name):
                findings.sources[name] = self.source(name)
        if not findings.built:
            with problems.gather(self.name):
                initialization.check_sources(self.recipe, self.name, self.workdir)
            return findings
        for name in self.data():
            with problems.gather(self.name):
                findings.rows[name] = self._row(name, findings.sources.get(name))

        def elements(name: str) -> int:
            return sum(x.size for x in findings.rows[name].values())

        memo: dict[Any, Any] = {}
        for name in sorted(findings.rows, key=elements):  # of each component, the largest remains
            unfit = f"{section}: a row of data {name!r} does not go through its model"
            with problems.gather(self.name), shape_errors(unfit):
                row = findings.rows[name]
                findings.flow |= flow(self.model, self.abstract, row, self.exact, memo)
        for name in schema.components(self.config):
            with problems.gather(f"{self.name}/{name}"):
                findings.starts[name] = initialization.find(
                    self.recipe, self.config, self.workdir, name, self.abstract[name],
                    upcoming=earlier, vocab_bound=0 if self.exact else self.vocab_size,
                )  # fmt: skip
        with problems.gather(self.name):
            findings.memory = self._allocated(findings.rows)
            memory.require_room(section, findings.memory, limit)
        earlier[self.name] = {name: self.abstract[name] for name in self.trained}
        return findings

    def _row(self, name: str, source: Source | None) -> "Shapes":
        """Return the shapes of a batch of one row of a data set; check that its rows are usable."""
        from vadapter.stages.abstract_state import row_shapes
        from vadapter.stages.flow import check_room

        data = self.recipe.data[name]
        kind = source.kind if source else "clip"  # the larger of the two, if it is unknown
        if self.view is not None and kind == "text":
            raise ConfigError(f"data {name!r} has no images, which {self.name} needs")
        prompt = 0 if data.task == "document" else prompt_len(data.task, self.tokenizer)
        sizes = self.sizes(name, kind=kind, prompt=prompt)
        if self.exact and source is not None:
            items, transform = make_stream(name, data, source, self.tokenizer, self.view)
            if name in self.config.data:
                require_usable(items, self.config.batch, name)
            if data.task != "document":
                check_room(name, data.texts, transform)
        return row_shapes(sizes)

    def _allocated(self, rows: "dict[str, Shapes]") -> dict[str, int]:
        """Return the bytes on each device that stay allocated while it trains.

        Of a batch, those of the largest of `rows`; without images where their tokens are cached.
        """
        from vadapter.stages.abstract_state import bytes_per_device

        trainable, frozen = self.abstract_params()
        count = self.config.batch // (self.mesh.shape["data"] * self.mesh.shape["fsdp"])
        row_bytes = [
            sum(x.size * x.dtype.itemsize for key, x in rows[name].items()
                if key != "frames" or not self.recipe.data[name].cache)
            for name in self.config.data if name in rows
        ]  # fmt: skip
        return {
            **{name: bytes_per_device(tree) for name, tree in (trainable | frozen).items()},
            "optimizer": bytes_per_device(self.abstract_state.opt_state),
            "batch": count * max(row_bytes, default=0),
        }

    # -- load ----------------------------------------------------------------------------------

    @functools.cached_property
    def starts(self) -> dict[str, initialization.Start]:
        """Where every component starts. Stages that it starts from must be finished."""
        return initialization.plan(self.recipe, self.config, self.workdir, self.abstract)

    def load_params(self, *, resumed: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the (trained, frozen) parameters that it starts from; frozen in compute dtype.

        If resumed, without the trained ones, which come from a checkpoint of this stage.
        """
        from vadapter.models.adapter_model import component_key
        from vadapter.stages.steps import split

        names = [name for name in self.starts if not (resumed and name in self.trained)]
        initialized = [name for name in names if self.starts[name].needs_init]
        rng = component_key(jax.random.key(self.recipe.seed), self.name)
        initial = self.initializer.random(initialized, rng, self.abstract)
        params = {name: self.load(name, self.starts[name], initial.get(name)) for name in names}
        fresh = [name for name in names if self.starts[name].source == "random"]
        params |= self.initializer.like_words(params, fresh, self.vocab_size)
        return split(params, tuple(name for name in self.trained if name in params))

    def init_state(self, trainable: dict[str, Any]) -> "steps.TrainState":
        """Return the state before the first step, of parameters from `load_params`."""
        from vadapter.stages import steps

        out = shardings_of(self.abstract_state)
        return jit(lambda params: steps.init_state(params, self.tx), out_shardings=out)(trainable)

    def load(self, name: str, start: initialization.Start, initial: Any = None) -> Any:
        """Return the parameters of a component, read or `initial`; frozen in compute dtype."""
        dtype = None if name in self.trained else DTYPES[self.recipe.dtype]
        return initialization.load(start, self.abstract[name], initial, dtype)

    # -- identity ------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Return what must be equal for a checkpoint of this stage to be resumed.

        Data and starts count by their content, wherever they are stored.
        """
        names = schema.components(self.config)
        identity = {
            **settings(self.recipe, self.name),
            "fingerprints": {n: self.source(n).fingerprint() for n in self.config.data},
            "tokenizer": self.tokenizer.digest,
            "start": {n: self.starts[n].digest for n in names},
        }
        return self.upgrade_identity(identity)  # specs of components may have old names of keys

    def measured(self) -> dict[str, str]:
        """Return the content of the data sets that it measures losses on and evaluates on."""
        names = schema.measured_data(self.recipe, self.config)
        return {name: self.source(name).fingerprint() for name in names}

    @staticmethod
    def upgrade_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
        """Return an identity that an earlier version wrote with the keys of this one."""
        sections = {"config": StageConfig, "data": dict[str, DataConfig]}
        new = {key: with_new_keys(sections.get(key), value) for key, value in identity.items()}
        if "config" in new:
            new["config"] = with_defaults(StageConfig, new["config"], _NO_CONFIG)
        if "data" in new:
            new["data"] = {
                name: with_defaults(DataConfig, values, _NO_DATA)
                for name, values in new["data"].items()
            }
        if "components" in new:
            specs = new["components"]
            new["components"] = results.kept("keys", specs, lambda: _with_new_keys(specs))
        return new

    def setup(self) -> dict[str, Any]:
        """Return what else the last bits of a result depend on, for the record."""
        return {
            "mesh": dict(self.mesh.shape),
            "hosts": hosts.count(),
            "device": self.mesh.devices.flat[0].device_kind,
            "jax": jax.__version__,
        }

    # -- data ----------------------------------------------------------------------------------

    def stream(self, name: str, frozen: dict[str, Any]) -> tuple[Any, Any]:
        """Return (items, transform) of a data set; with `cache`, over tokens of the encoder."""
        config, source = self.recipe.data[name], self.source(name)
        if config.cache and STAGES[self.config.kind].visual and self.model.encoder in frozen:
            source = self.features(name, frozen)
        return make_stream(name, config, source, self.tokenizer, self.view)

    def features(self, name: str, params: dict[str, Any]) -> Source:
        """Return the data set's source; with `cache`, over tokens of the frozen encoder."""
        if not self.recipe.data[name].cache:
            return self.source(name)
        encoder = self.model.encoder
        digest = self.digests.get(encoder) or self.starts[encoder].digest
        if (name, digest) not in self._features:
            from vadapter.stages.feature_cache import encoded

            self._features[name, digest] = encoded(
                self.source(name), self.recipe.data[name], self.workdir, mesh=self.mesh,
                encoder=self.model.modules[encoder], params=params[encoder], digest=digest,
                watch=lambda batches: self.stop.watch(batches, self.name, "features"),
            )  # fmt: skip
        return self._features[name, digest]


def settings(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Return the part of a stage's identity that follows from the recipe alone."""
    config = recipe.stages[stage]
    names = schema.components(config)
    return {
        "stage": stage,
        "config": _without(config, *_NO_CONFIG),
        "components": {n: _without(recipe.components[n], "weights") for n in names},
        "data": {n: _without(recipe.data[n], *_NO_DATA) for n in config.data},
        "seed": recipe.seed,
        "dtype": recipe.dtype,
    }


def _with_new_keys(specs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the specs of components with new names of keys, which only their kinds know."""
    return {
        name: with_new_keys(load_kind(expand(name, spec)["kind"])[0], spec)
        for name, spec in specs.items()
    }


def _without(group: Any, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in plain(group).items() if key not in keys}
