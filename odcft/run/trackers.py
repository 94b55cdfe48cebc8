"""Where the figures of a run also go while it trains: TensorBoard, Weights & Biases, MLflow.

metrics.jsonl has everything; a tracker only shows it. So one that fails is dropped with a note, and the run goes on.
Nothing leaves the machine unless the environment of the user says so (WANDB_MODE, MLFLOW_TRACKING_URI).
"""

import hashlib
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from odcft.distributed import dist
from odcft.errors import OdcftError
from odcft.files import read_json
from odcft.plan import Plan
from odcft.recipe import flatten

PACKAGES = {"wandb": ("wandb", "odcft[wandb]"), "mlflow": ("mlflow", "odcft[mlflow]")}  # module, what installs it
MAX_PARAM = 500  # characters of a recipe field that MLflow is given
PARAMS_AT_A_TIME = 100  # MLflow takes no more in one call
BINS = 64  # of the histogram of cluster sizes


class Tracker(Protocol):
    """One tracker, for one run. Every method may raise anything."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take the figures of a step."""

    def sizes(self, step: int, sizes_K: np.ndarray) -> None:
        """Take the sizes of all clusters, int64 (K,), as a histogram."""

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Take a picture, uint8 (H, W, 3)."""

    def flush(self) -> None:
        """Write what is pending."""

    def close(self) -> None:
        """End this part of the run; a resumed run may open it again."""


class TensorBoard:
    """TensorBoard's event files, in RUN/tensorboard."""

    def __init__(self, run: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=first_step or None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one event for each figure."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def sizes(self, step: int, sizes_K: np.ndarray) -> None:
        """Write the histogram."""
        self.writer.add_histogram("cluster_sizes", sizes_K, step, bins=min(BINS, len(sizes_K)))

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Write the picture into the event file."""
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """Flush the event file."""
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


class WandB:
    """Weights & Biases: offline, in the folder `wandb` beside the RUN, unless WANDB_MODE and WANDB_DIR say otherwise.

    The id is that of the RUN, by which `wandb sync` joins the parts of a run that was resumed. The figures have a
    `step` of their own: W&B's would refuse the steps that a resumed run takes once more.
    """

    def __init__(self, run: Path, plan: Plan, id: str) -> None:
        mode: Any = os.environ.setdefault("WANDB_MODE", "offline")
        if mode != "online":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "odcft"),
            name=os.environ.get("WANDB_NAME", run.absolute().name),
            dir=os.environ.get("WANDB_DIR", str(run.absolute().parent)),
            id=id,
            resume="allow",
            config=plan.model_dump(mode="json"),
            mode=mode,
            settings=wandb.Settings(
                **{"console": "off", "silent": True, "disable_git": True, "disable_code": True, "save_code": False},
                **{"disable_job_creation": True, "x_disable_stats": True, "x_disable_meta": True},
            ),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log the figures."""
        self.run.log({"step": step, **values})

    def sizes(self, step: int, sizes_K: np.ndarray) -> None:
        """Log the histogram."""
        histogram = np.histogram(sizes_K, bins=min(BINS, len(sizes_K)))
        self.run.log({"step": step, "cluster_sizes": self.wandb.Histogram(np_histogram=histogram)})

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Log the picture."""
        self.run.log({"step": step, name: self.wandb.Image(pixels)})

    def flush(self) -> None:
        """W&B writes on its own."""

    def close(self) -> None:
        """Finish the run; offline this only closes a file."""
        self.run.finish()


class MLflow:
    """MLflow: in the folder `mlruns` beside the RUN, unless MLFLOW_TRACKING_URI names another place.

    A resumed run is found again by the id of the RUN, which it has as the tag `odcft.id`. MLflow has no histograms:
    of the cluster sizes it gets five quantiles.
    """

    def __init__(self, run: Path, plan: Plan, id: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        for name, value in (("MAX_RETRIES", "1"), ("TIMEOUT", "10")):  # training waits for a server that is away
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (run.absolute().parent / "mlruns").as_uri()
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self.metric, self.client = Metric, MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "odcft")
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        earlier = self.client.search_runs([experiment], f"tags.`odcft.id` = '{id}'", max_results=1)
        if earlier:
            self.id = earlier[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            return
        made = self.client.create_run(experiment, run_name=run.absolute().name, tags={"odcft.id": id})
        self.id = made.info.run_id
        fields = flatten(plan.model_dump(mode="json"))
        params = [Param(name, str(value)[:MAX_PARAM]) for name, value in fields.items()]
        for start in range(0, len(params), PARAMS_AT_A_TIME):
            self.client.log_batch(self.id, params=params[start : start + PARAMS_AT_A_TIME])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log the figures."""
        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[self.metric(key, value, now, step) for key, value in values.items()])

    def sizes(self, step: int, sizes_K: np.ndarray) -> None:
        """Log quantiles."""
        quantiles = np.quantile(sizes_K, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist()
        names = (f"cluster_sizes_{percent:02d}_percent" for percent in (5, 25, 50, 75, 95))
        self.scalars(step, dict(zip(names, quantiles, strict=True)))

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Log the picture."""
        self.client.log_image(self.id, pixels, key=name, step=step)

    def flush(self) -> None:
        """MLflow writes at once."""

    def close(self) -> None:
        """Note that the run ended."""
        self.client.set_terminated(self.id)


class Trackers:
    """All trackers of a run; one that fails is dropped, with a note. Rank 0 has them, other ranks have none.

    Args:
        say: called with the note.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.active: dict[str, Tracker] = {}

    def __bool__(self) -> bool:
        return bool(self.active)

    def open(self, name: str, make: Callable[[], Tracker]) -> None:
        """Start one."""
        with self._dropping(name, "cannot be started"):
            self.active[name] = make()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Give all of them the numbers among the figures of a step."""
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        self._each("scalars", step, numbers)

    def sizes(self, step: int, sizes_K: np.ndarray) -> None:
        """Give all of them the sizes of the clusters."""
        self._each("sizes", step, sizes_K)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Give all of them a picture, uint8 (H, W, 3)."""
        self._each("picture", step, name, pixels)

    def flush(self) -> None:
        """Write what is pending."""
        self._each("flush")

    def close(self) -> None:
        """Close all of them."""
        self._each("close")
        self.active.clear()

    def _each(self, method: str, *args: Any) -> None:
        for name, tracker in list(self.active.items()):
            with self._dropping(name, "failed"):
                getattr(tracker, method)(*args)

    @contextmanager
    def _dropping(self, name: str, what: str) -> Iterator[None]:
        """Drop a tracker, with a note, if anything goes wrong in this context."""
        try:
            yield
        except Exception as error:  # of whatever kind its library raises
            self.active.pop(name, None)
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            self.say(
                f"Note        {name} {what} ({reason}). The run continues without it; metrics.jsonl has all figures."
            )


def require_trackers(names: Iterable[str]) -> None:
    """Refuse to start a run with trackers that are not installed."""
    for name in names:
        module, extra = PACKAGES[name]
        if importlib.util.find_spec(module) is None:
            raise OdcftError(f'log.trackers={name} needs the package {module}: pip install "{extra}", or leave it out.')


def open_trackers(run: Path, plan: Plan, first_step: int, say: Callable[[str], None]) -> Trackers:
    """The trackers that a recipe asks for.

    Args:
        run: the RUN.
        plan: `log.tensorboard` and `log.trackers` say which.
        first_step: of this process: the number of steps done before it.
        say: called with a note for each that fails.
    """
    trackers = Trackers(say)
    if dist.rank() > 0:
        return trackers
    id = id_of(run)
    if plan.log.tensorboard:
        trackers.open("TensorBoard", lambda: TensorBoard(run, first_step))
    if "wandb" in plan.log.trackers:
        trackers.open("Weights & Biases", lambda: WandB(run, plan, id))
    if "mlflow" in plan.log.trackers:
        trackers.open("MLflow", lambda: MLflow(run, plan, id))
    return trackers


def id_of(run: Path) -> str:
    """What trackers recognise a RUN by: the id in its run.json, or else a hash of its place."""
    with suppress(OdcftError):
        id = read_json(run / "run.json").get("id")
        if isinstance(id, str) and re.fullmatch("[0-9a-f]{32}", id):
            return id
    return hashlib.blake2b(os.fsencode(run.absolute()), digest_size=16).hexdigest()
