"""Training on the procedural world: every part, from nothing to a folder that samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opensora_core import components, world
from opensora_core.config import Config, with_settings
from opensora_core.diffusion import RectifiedFlow
from opensora_core.errors import UsageError
from opensora_core.files import verify_manifest
from opensora_core.presets import preset
from opensora_core.tensors import Condition
from opensora_core.training import check_export, export, train
from opensora_core.training.denoiser import DenoiserTask
from opensora_core.training.events import Resumed, TrainProgress
from opensora_core.training.world import AutoencoderTask, DecoderTask, TextTask, make_text_encoder, to_tensor
from opensora_core.vae.patch import PatchVAE


def test_pixels_become_numbers_around_zero() -> None:
    frames = np.arange(2 * 3 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 3, 4, 5, 3)
    video = to_tensor(frames)
    assert video.shape == (2, 3, 3, 4, 5)
    assert video[1, 2, 0, 3, 4] == frames[1, 0, 3, 4, 2] / 127.5 - 1


def test_batches_are_a_function_of_seed_and_step() -> None:
    def frames(seed: int, step: int) -> torch.Tensor:
        return AutoencoderTask(PatchVAE(), batch_size=2, seed=seed).batch(step)

    assert torch.equal(frames(1, 5), frames(1, 5))
    assert not torch.equal(frames(1, 5), frames(1, 6))
    assert not torch.equal(frames(1, 5), frames(2, 5))


def test_the_autoencoder_learns() -> None:
    torch.manual_seed(0)
    vae = PatchVAE(latent_channels=4, decoder_width=16, decoder_depth=1)
    task = AutoencoderTask(vae, batch_size=2, seed=0)
    batch, generator = task.batch(0), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-2)
    seen = []
    for _ in range(30):
        losses = next(task.losses(batch, generator))
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(losses["psnr"].item())
    assert seen[-1] > seen[0] + 6
    task.measure_statistics(num_batches=1)
    latents = vae.encode(task.batch(10**9)[:, :, None])
    assert latents.mean().abs() < 0.1 and 0.8 < latents.std() < 1.2


def test_the_decoder_goes_on_alone() -> None:
    torch.manual_seed(0)
    vae = PatchVAE(latent_channels=4, decoder_width=16, decoder_depth=1)
    task = DecoderTask(vae, batch_size=2, seed=0)
    next(task.losses(task.batch(0), torch.Generator()))["loss"].backward()
    assert all(parameter.grad is None for parameter in vae.encoder_blocks.parameters())
    assert all(parameter.grad is not None for parameter in vae.decoder_blocks.parameters())


@pytest.mark.parametrize("draws", [1, 3])
def test_a_clip_is_seen_with_as_many_noises_as_asked_for(draws: int) -> None:
    class Recorded(DenoiserTask):
        def encoded(self, batch: Any, generator: torch.Generator) -> tuple[torch.Tensor, Condition]:
            return torch.arange(2.0).view(2, 1, 1, 1, 1).expand(2, 8, 4, 2, 2), Condition(torch.zeros(2, 1, 128))

    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Objective(RectifiedFlow):
        def losses(self, denoiser: Any, x0: Any, timestep: Any, noise: Any, condition: Any) -> dict[str, torch.Tensor]:
            seen.append((x0[:, 0, 0, 0, 0], noise))
            return {"loss": timestep}

    model = components.empty_model(with_settings(preset("tiny"), SMALL | {"model.caption_channels": 128}))
    task = Recorded(model, Objective())
    task.draws = draws
    list(task.losses(None, torch.Generator().manual_seed(0), 2))
    x0, noise = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert x0.tolist() == [0.0] * draws + [1.0] * draws
    assert len(noise.flatten(1).unique(dim=0)) == 2 * draws


def test_captions_become_labels_with_a_class_for_what_goes_unsaid(tmp_path: Path) -> None:
    make_text_encoder(tmp_path, width=32, max_length=48, seed=0, num_captions=300)
    task = TextTask(tmp_path, batch_size=16, seed=0, max_length=48)
    ids, mask, labels = task.batch(0)
    assert ids.shape == mask.shape == (16, 48)
    assert (labels["weather"] == len(world.ATTRIBUTES["weather"])).any()  # most leave clear weather out
    for name in ("color", "shape"):  # which a caption says, but for words that are left out
        unsaid = labels[name] == len(world.ATTRIBUTES[name])
        assert unsaid.any() and not unsaid.all()
    assert task.tokenizer("naïve 球 !").input_ids[-1] == task.tokenizer.eos_token_id
    losses = next(task.losses((ids, mask, labels), torch.Generator()))
    assert losses["loss"].item() == pytest.approx(
        sum(np.log(len(values) + 1) for values in world.ATTRIBUTES.values()), rel=0.4
    )


SMALL = {
    "model.hidden_size": 32,
    "model.depth": 1,
    "model.num_heads": 2,
    "model.caption_channels": 32,
    "train.max_steps": 2,
    "train.vae_steps": 2,
    "train.decoder_steps": 1,
    "train.text_steps": 2,
    "train.batch_size": 2,
    "train.log_every": 1,
    "runtime.device": "cpu",
}


@pytest.fixture(scope="module")
def small() -> Config:
    return with_settings(preset("tiny"), SMALL)


@pytest.mark.slow
def test_from_nothing_to_a_model_that_samples(tmp_path: Path, small: Config) -> None:
    from opensora_core.sampling import Saved, plan, sample

    run = tmp_path / "run"
    parts = [event.part for event in train(small, output=run) if isinstance(event, TrainProgress)]
    assert parts == ["vae", "vae", "decoder", "text", "text", "model", "model"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 7
    with pytest.raises(UsageError, match="holds a run already"):
        next(train(small, output=run))

    export(run, tmp_path / "model")
    verify_manifest(tmp_path / "model")
    config = with_settings(small, {"model.weights": str(tmp_path / "model"), "sampling.steps": 2})
    todo = plan(config, ["a red ball"], tmp_path / "out.mp4")
    assert any(isinstance(event, Saved) for event in sample(config, todo))
    assert (tmp_path / "out.mp4").stat().st_size > 0

    longer = with_settings(small, {"train.max_steps": 3})
    events = list(train(longer, output=run, resume=True))
    assert [(event.part, event.step) for event in events if isinstance(event, Resumed)] == [
        ("decoder", 1),
        ("model", 2),
    ]
    assert json.loads((run / "config.json").read_text())["train"]["max_steps"] == 3


def test_what_cannot_be_trained_is_refused(tmp_path: Path, small: Config) -> None:
    for changes, words in (
        ({"data.source": ""}, "no data"),
        ({"video.height": 128}, "16x64x64"),
        ({"text.kind": "clip"}, "from nothing"),
        ({"data.cache": "c"}, "no cache"),
        ({"runtime.offload": True}, "offload"),
        ({"train.accumulate": 9}, "accumulate"),
        ({"train.batch_size": 0}, "less than 1"),
        ({"train.lora_rank": 4, "train.trainable": "all-but-text"}, "leave one"),
    ):
        with pytest.raises(UsageError) as caught:
            next(train(with_settings(small, changes), output=tmp_path / "a"))
        assert words in caught.value.message + caught.value.hint
    with pytest.raises(UsageError, match="holds no run"):
        next(train(small, output=tmp_path / "a", resume=True))
    with pytest.raises(UsageError, match="no checkpoint"):
        export(tmp_path, tmp_path / "b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    with pytest.raises(UsageError, match="not empty"):
        check_export(tmp_path / "full")
    check_export(tmp_path / "new")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
