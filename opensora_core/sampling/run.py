"""The run: the text encoder reads all prompts and is freed, the denoiser draws, the VAE turns latents into pixels.

One process is a grid of one. Of several each runs all of this; what they share is said by `sharing.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from torch import Tensor

from opensora_core import components, parallel
from opensora_core.config import Config, to_dict, with_settings
from opensora_core.errors import ResourceError
from opensora_core.parallel import Axis, Mesh
from opensora_core.parallel.fabric import compare, digest
from opensora_core.parallel.watchdog import Parted, Watch, watching
from opensora_core.sampling.captions import read_captions
from opensora_core.sampling.drawing import load_drawer
from opensora_core.sampling.events import Done, Event, Loading, Notice
from opensora_core.sampling.loading import PARTS, fetch, free
from opensora_core.sampling.planning import Plan
from opensora_core.sampling.sharing import rounds_of, sharing_of
from opensora_core.sampling.writing import Writer


def sample(config: Config, plan: Plan, *, sheet: bool = False) -> Iterator[Event]:
    """Draw the samples of a plan and write them; each file is whole or absent.

    Every process of a run iterates over its own call; `Saved`, `Sheet`, `Gallery` and `Done` come to the first one.

    Args:
        config: the settings that the plan was made of.
        plan: what to draw, and where to put it.
        sheet: also write a contact sheet.

    Raises:
        WeightsError, CheckpointError: weights that are missing, torn or of another model.
        InputError: a class that the model does not know, or a size that it cannot make.
        ResourceError: out of memory (with flags that help), out of disk space, no permission.
        UsageError: processes that were asked for different things; one is named.
        OsoraError: what another process of the run failed with.
    """
    start = time.monotonic()
    for notice in plan.notices:
        yield Notice(notice)
    sharing = sharing_of(config, parallel.launched())
    device = components.resolve_device(config.runtime.device)
    asked, config = config, with_settings(config, {"runtime.device": str(device)})
    limit = config.parallel.timeout_seconds
    with (
        parallel.joined(device, sequence=sharing.sequence, cfg=sharing.cfg, timeout_seconds=limit) as mesh,
        _nothing_to_resume(),
        watching(mesh, timeout_seconds=limit, lost_seconds=config.parallel.lost_seconds) as watch,
        _advice(config),
        parallel.patient(mesh) as everyone,
    ):
        compare(mesh, {"settings": digest(to_dict(asked)), "prompts": digest(asdict(plan)["requests"])})
        yield from _draw(config, plan, mesh, everyone, watch, sheet=sheet)
        is_first = mesh.is_first
    if is_first:
        yield Done(len(plan.requests), time.monotonic() - start)


def _draw(config: Config, plan: Plan, mesh: Mesh, everyone: Axis, watch: Watch, *, sheet: bool) -> Iterator[Event]:
    components.tune_allocator(mesh.device)
    for part in plan.weights:
        yield from fetch(config, part, everyone)

    captions = yield from read_captions(config, plan, mesh)

    yield Loading(PARTS["vae"])
    vae = components.build_vae(config)
    shape = vae.latent_shape(config.video.num_frames, config.video.height, config.video.width)
    writer = Writer(config, plan, mesh, everyone, sheet=sheet)
    rounds = rounds_of(plan.requests, mesh.data.size, config.sampling.batch_size)
    if config.runtime.offload:  # one part at a time in memory, from the first to the last
        del vae
        free()
        drawer = yield from load_drawer(config, captions, shape, mesh)
        drawn: list[Tensor] = []
        for number, batches in enumerate(rounds):
            watch.step(number)
            latents = yield from drawer.draw(batches)
            drawn += latents.cpu()
        del drawer
        free()
        yield Loading(PARTS["vae"])
        whole = [[request for batch in batches for request in batch] for batches in zip(*rounds, strict=True)]
        yield from writer.write(components.build_vae(config), whole, drawn)
    else:
        drawer = yield from load_drawer(config, captions, shape, mesh)
        for number, batches in enumerate(rounds):
            watch.step(number)
            latents = yield from drawer.draw(batches)
            yield from writer.write(vae, batches, list(latents))
    yield from writer.finish()
    parallel.gathered(everyone, None)  # nobody leaves before all is written


@contextmanager
def _nothing_to_resume() -> Iterator[None]:
    """Say of a run that broke apart what can be done about it here, where there is nothing to resume."""
    try:
        yield
    except Parted as error:
        error.hint = "files that are there are whole; --prompt draws the others again"
        raise


@contextmanager
def _advice(config: Config) -> Iterator[None]:
    """Turn running out of memory into an error that says which flags would help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own OutOfMemoryError is a RuntimeError
        if not components.is_out_of_memory(error):
            raise
        video = config.video
        advice = [
            (config.sampling.batch_size > 1, "--batch-size 1"),
            (not config.runtime.offload, "--offload"),
            (config.runtime.dtype in ("auto", "fp32"), "--dtype bf16"),
            (config.vae.micro_batch > 1, "--set vae.micro_batch=1"),
            (video.num_frames > 1, f"--frames {max(video.num_frames // 2, 1)}"),
            (True, f"--size {video.height // 2}x{video.width // 2}"),
            (not config.vae.tiling, "--set vae.tiling=true"),
        ]
        flags = [flag for helps, flag in advice if helps]
        raise ResourceError(
            f"out of memory on {config.runtime.device}", "what makes it smaller: " + ", ".join(flags)
        ) from error
