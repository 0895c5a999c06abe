"""A run, from its folder to its last step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from opensora_core import assets, components
from opensora_core.config import Config, read_settings, to_dict, with_settings
from opensora_core.data.dataset import Batches, CachedClips, ClipReader
from opensora_core.data.order import BatchOrder
from opensora_core.data.survey import UNREADABLE
from opensora_core.errors import OsoraError, ResourceError, Stopped, UsageError
from opensora_core.files import sha256, write_bytes
from opensora_core.parallel import joined
from opensora_core.parallel.agreement import agreed, by_first, gathered
from opensora_core.parallel.fabric import check_fabric, digest
from opensora_core.parallel.watchdog import watching
from opensora_core.runs import (
    CHECKPOINTS,
    CLIPS_FILE,
    CONFIG_FILE,
    METRICS_FILE,
    REJECTS_FILE,
    VALIDATION_FILE,
    checkpoints,
    is_checkpoint,
    only_writer,
    step_of,
)
from opensora_core.training.clips import ClipsTask, Rejects
from opensora_core.training.corpus import Corpus, buckets_of, gather
from opensora_core.training.denoiser import fit_denoiser, prepare
from opensora_core.training.encoders import Parts
from opensora_core.training.events import Event, Notice, Working
from opensora_core.training.filling import fill
from opensora_core.training.loop import require_shares
from opensora_core.training.report import Recorder
from opensora_core.training.settings import WORLD, axes_of, check_axes, check_settings, with_absolute_paths
from opensora_core.training.task import Crew
from opensora_core.training.validation import prepare_validation
from opensora_core.training.world import train_world


def train(config: Config, *, output: Path, resume: bool = False) -> Iterator[Event]:
    """Train a denoiser on `data.source`; `world` trains autoencoder and text encoder first, all from nothing.

    Under a launcher every process of the run calls it with the same arguments. They share the batches, and the first
    writes what is written once; the others' events are for nobody.

    Args:
        config: the settings; saved in the run's folder and with every checkpoint.
        output: the run's folder, see `opensora_core.runs`; to resume, also one of its checkpoints.
        resume: go on with the run that is there.

    Raises:
        UsageError: a folder that holds a run already or is in use, none to resume, no data, or batches that the
            processes cannot share equally.
        InputError: data that cannot be read, or of which nothing is usable.
        ConfigError: settings that contradict each other.
        TrainingError, CheckpointError, WeightsError, ResourceError, DeviceError, Stopped: see `fit`.
    """
    config = with_absolute_paths(config)
    check_settings(config)
    device = components.resolve_device(config.runtime.device)
    components.tune_allocator(device)
    seconds, lost = config.parallel.timeout_seconds, config.parallel.lost_seconds
    with (
        joined(device, **axes_of(config.parallel), timeout_seconds=seconds) as mesh,
        watching(mesh, timeout_seconds=seconds, lost_seconds=lost) as watch,
    ):
        check_axes(config.parallel, mesh)
        require_shares({"train.batch_size": config.train.batch_size}, mesh)
        if mesh.size > 1:
            facts = {"settings": digest(to_dict(config)), "data": _seen_at(config.data.source)}
            yield from check_fabric(mesh, facts)
        yield from _run(config, output, Crew(mesh, watch), resume=resume)


def _seen_at(source: str) -> str:
    """What this machine finds where the data is said to be: the sum of a manifest, or of the names in a folder."""
    path = Path(source)
    if path.is_file():
        return sha256(path)[:16]
    if path.is_dir():
        return digest(sorted(entry.name for entry in path.iterdir()))
    return source if source == WORLD else "nothing"


def _run(config: Config, output: Path, crew: Crew, *, resume: bool) -> Iterator[Event]:
    mesh = crew.mesh
    run = _run_of(output)
    notices: list[Event] = []
    is_new = not run.exists()
    try:
        with ExitStack() as held, _advice(config):
            with agreed(mesh.whole):
                if mesh.is_first:
                    _require_startable(config, run, resume=resume)
                    held.enter_context(only_writer(run))
                    notices += _begin(config, run, output, resume=resume)
            yield from notices
            events = (train_world if config.data.source == WORLD else _clips)(config, run, crew)
            yield from _recorded(events, run, config) if mesh.is_first else events
    except OsoraError:
        if mesh.is_first and is_new and not _has_begun(run) and not (run / REJECTS_FILE).exists():
            shutil.rmtree(run, ignore_errors=True)  # it never began, and has nothing to tell
        raise


def _require_startable(config: Config, run: Path, *, resume: bool) -> None:
    if not resume and _has_begun(run):
        raise UsageError(f"{run} holds a run already", f"go on with it by --resume {run}, or choose another --output")
    if resume and not (run / CONFIG_FILE).exists():
        raise UsageError(f"{run} holds no run to resume", "leave out --resume to start one")
    if resume and (began := read_settings(run / CONFIG_FILE).get("data.source")) != config.data.source:
        raise UsageError(
            f"{run} learns from {began} and keeps the clips that it began with, but --data is {config.data.source}",
            f"start another run from what this one has learned: --init {run}",
        )


def _begin(config: Config, run: Path, output: Path, *, resume: bool) -> Iterator[Event]:
    """Make a run's folder ready."""
    if not resume:  # what a start that came to nothing left there
        for name in (CLIPS_FILE, REJECTS_FILE, METRICS_FILE, VALIDATION_FILE):
            (run / name).unlink(missing_ok=True)
        shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
    if output != run:
        yield from _go_back(run, output)
    write_bytes(run / CONFIG_FILE, (json.dumps(to_dict(config), indent=1) + "\n").encode())


def _has_begun(run: Path) -> bool:
    """Whether there is something in a run's folder that would be lost if it began anew."""
    return any((run / CHECKPOINTS).glob("**/step-*")) or (run / "vae").exists()


def _run_of(output: Path) -> Path:
    return output.resolve().parents[1] if is_checkpoint(output) else output


def _go_back(run: Path, wanted: Path) -> Iterator[Event]:
    """Set the checkpoints aside that are newer than the one to resume from."""
    for newer in checkpoints(run / CHECKPOINTS):
        if step_of(newer) > step_of(wanted):
            newer.rename(newer.with_name(f"{newer.name}.left"))
            yield Notice(f"{newer} is set aside as {newer.name}.left")


def _recorded(events: Iterator[Event], run: Path, config: Config) -> Iterator[Event]:
    """Pass events on, and write down what they measured."""
    saved = checkpoints(run / CHECKPOINTS)
    first_step = step_of(saved[0]) if saved else 0
    # the three parts of the world's model count their steps each for itself: none may hide the others' curves
    recorder = Recorder(run, config, None if config.data.source == WORLD else first_step)
    try:
        for event in events:
            recorder.write(event)
            yield event
    except Stopped as error:
        raise Stopped(error.message, f"resume with: osora train --resume {run}", error.exit_code - 128) from error
    finally:
        recorder.close()


def fill_cache(config: Config) -> Iterator[Event]:
    """Fill `data.cache` with what training would encode, and stop.

    Raises:
        As `train`.
    """
    config = with_absolute_paths(config)
    check_settings(config, cache_only=True)
    device = components.resolve_device(config.runtime.device)
    components.tune_allocator(device)
    folder = Path(config.data.cache)
    with joined(device, timeout_seconds=config.parallel.timeout_seconds) as mesh, _advice(config):
        yield from by_first(mesh, _find_weights(config, with_init=False))
        corpus = yield from by_first(mesh, gather(config, None))
        rejects = Rejects(folder, len(corpus.manifest), config.data.max_rejects, writes=mesh.is_first)
        gathered(mesh.whole, None)
        yield from _left_out(corpus, rejects)
        yield from fill(config, corpus, _reader(config, corpus), rejects, mesh)


def _clips(config: Config, run: Path, crew: Crew) -> Iterator[Event]:
    """Train on the clips of a manifest."""
    mesh = crew.mesh
    dtype = components.resolve_dtype(config.runtime.dtype, mesh.device)
    yield from by_first(mesh, _find_weights(config))
    require_shares({f"batches of {bucket}": bucket.batch_size for bucket in buckets_of(config)}, mesh)
    corpus = yield from by_first(mesh, gather(config, run))
    rejects = Rejects(run, len(corpus.manifest), config.data.max_rejects, writes=mesh.is_first)
    gathered(mesh.whole, None)  # everybody has read what an earlier start rejected before the first one adds to it
    yield from _left_out(corpus, rejects)
    reader = _reader(config, corpus)
    cached: CachedClips | None = None
    if config.data.cache:
        cached = yield from fill(config, corpus, reader, rejects, mesh)
    parts = Parts(config, mesh)
    validation = yield from prepare_validation(config, run, corpus, reader, parts)
    yield Working("loading the model", 0, 1)
    notices: list[str] = []
    model = components.build_initial_model(config, parts.null_caption, notices.append)
    yield from map(Notice, notices)
    prepare(model, config)
    encoders = parts.encoders() if cached is None else parts.let_go()
    sizes = [bucket.batch_size for bucket in corpus.buckets]
    task = ClipsTask(
        model,
        components.build_objective(config),
        source=Batches(reader, BatchOrder(corpus.members, sizes, config.train.seed), cached),
        encoders=encoders,
        rejects=rejects,
        validation=validation,
        dtype=dtype,
        lora=(config.train.lora_rank, config.train.lora_alpha) if config.train.lora_rank else None,
    )
    yield from fit_denoiser(task, config, run / CHECKPOINTS, crew)


def _find_weights(config: Config, *, with_init: bool = True) -> Generator[Event, None, None]:
    """Find or download all weights before anything else is done: what cannot be had is said at once.

    Raises:
        UsageError, WeightsError, CheckpointError: there are none.
    """
    wanted: list[tuple[assets.Kind, Config]] = [("vae", config)]
    if config.text.weights:
        wanted.append(("text", config))
    if with_init and config.train.init:
        wanted.append(("model", with_settings(config, {"model.weights": config.train.init})))
    for kind, settings in wanted:
        yield Working(f"finding {components.word_of(settings, kind)}", 0, 1)
        components.locate(settings, kind)


def _left_out(corpus: Corpus, rejects: Rejects) -> Iterator[Event]:
    """Write down the clips that the survey left out, and tell how many there were."""
    if corpus.survey is None:
        return
    for clip, reason in corpus.survey.rejects():
        yield from rejects.add(clip, reason, broken=reason.startswith(UNREADABLE))
    if corpus.survey.reasons:
        counted = ", ".join(f"{count} {reason}" for reason, count in corpus.survey.reasons.most_common())
        used = f"{corpus.survey.num_usable} of {len(corpus.manifest)} clips are used"
        yield Notice(f"{used}; left out: {counted}; see {rejects.path}")


def _reader(config: Config, corpus: Corpus) -> ClipReader:
    return ClipReader(
        corpus.manifest,
        corpus.buckets,
        corpus.pace,
        resize=config.data.resize,
        flip=config.data.flip,
        seed=config.train.seed,
        threads=config.data.decode_threads,
    )


@contextmanager
def _advice(config: Config) -> Iterator[None]:
    """Turn running out of memory into an error that says which flags would help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not components.is_out_of_memory(error):
            raise
        train, video = config.train, config.video
        advice = [
            (train.batch_size > 1, f"--batch-size {max(train.batch_size // 2, 1)}"),
            (
                train.accumulate < train.batch_size,
                f"--set train.accumulate={min(2 * train.accumulate, train.batch_size)}",
            ),
            (train.recompute < 1, "--set train.recompute=1"),
            (config.runtime.dtype in ("auto", "fp32"), "--dtype bf16"),
            (not config.data.cache, "--cache DIR, which keeps the encoders out of memory"),
            (not train.lora_rank, "--set train.lora_rank=16"),
            (train.optimizer == "adamw", "--set train.optimizer=adamw-8bit"),
            (config.vae.micro_batch > 1, "--set vae.micro_batch=1"),
            (video.num_frames > 1, f"--set video.num_frames={max(video.num_frames // 2, 1)}"),
        ]
        flags = [flag for helps, flag in advice if helps]
        device = components.resolve_device(config.runtime.device)
        raise ResourceError(f"out of memory on {device}", "what makes it smaller: " + ", ".join(flags)) from error
