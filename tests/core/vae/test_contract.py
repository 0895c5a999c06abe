"""What every VAE of the table does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora_core.errors import CheckpointError, ConfigError, InputError, WeightsError
from opensora_core.vae import VAES, VideoVAE, load_vae
from opensora_core.vae.autoencoder import DiffusersVAE
from opensora_core.vae.patch import PatchVAE

STRIDES = {
    "kl": (1, 8, 8),
    "temporal-decoder": (1, 2, 2),
    "cogvideox": (4, 8, 8),
    "ltx": (8, 32, 32),
    "wan": (4, 8, 8),
    "hunyuan": (4, 8, 8),
    "patch": (1, 8, 8),
}
PER_FRAME = [kind for kind, stride in STRIDES.items() if stride[0] == 1]
CAUSAL = [kind for kind, stride in STRIDES.items() if stride[0] > 1]
CAUSAL_STEPS = {"cogvideox": 8, "ltx": 8, "wan": 4, "hunyuan": 4}

Folder = Callable[[str], Path]
every_kind = pytest.mark.parametrize("kind", VAES)


def clip(vae: VideoVAE, batch: int = 2, latent_frames: int = 3) -> torch.Tensor:
    """A random video that is two latents high and three wide."""
    shape = (batch, 3, vae.num_frames(latent_frames), 2 * vae.stride[1], 3 * vae.stride[2])
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def noise_for(vae: VideoVAE, video: torch.Tensor) -> torch.Tensor:
    shape = (len(video), *vae.latent_shape(*video.shape[2:]))
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@every_kind
def test_shapes_go_there_and_back(kind: str, vae_folder: Folder) -> None:
    vae = load_vae(kind, vae_folder(kind))
    assert vae.stride == STRIDES[kind]
    video = clip(vae)
    shape = vae.latent_shape(*video.shape[2:])
    assert shape == (vae.latent_channels, 3, 2, 3)
    latents = vae.encode(video)
    assert latents.shape == (2, *shape)
    decoded = vae.decode(latents)
    assert decoded.shape == video.shape
    assert latents.isfinite().all() and decoded.isfinite().all()
    assert not latents.requires_grad and not decoded.requires_grad


@every_kind
def test_one_frame_is_an_image(kind: str, vae_folder: Folder) -> None:
    vae = load_vae(kind, vae_folder(kind))
    video = clip(vae, batch=1, latent_frames=1)
    assert video.shape[2] == 1
    assert vae.decode(vae.encode(video)).shape == video.shape


@every_kind
def test_the_result_does_not_depend_on_the_micro_batch(kind: str, vae_folder: Folder) -> None:
    options = [{"micro_batch": 64}, {"micro_batch": 1}, {"micro_batch": 3}, {"slicing": True}]
    whole, *parts = [load_vae(kind, vae_folder(kind), **option) for option in options]
    video = clip(whole, batch=3)
    noise = noise_for(whole, video)
    latents = whole.encode(video, noise)
    decoded = whole.decode(latents)
    for vae in parts:
        torch.testing.assert_close(vae.encode(video, noise), latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(vae.decode(latents), decoded, atol=1e-4, rtol=1e-4)


@every_kind
def test_a_video_does_not_depend_on_its_batch(kind: str, vae_folder: Folder) -> None:
    vae = load_vae(kind, vae_folder(kind))
    video = clip(vae)
    noise = noise_for(vae, video)
    both = vae.encode(video, noise)
    alone = vae.encode(video[1:], noise[1:])
    torch.testing.assert_close(alone, both[1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vae.decode(alone), vae.decode(both)[1:], atol=1e-4, rtol=1e-4)


@every_kind
def test_the_posterior_is_sampled_with_the_noise_given(kind: str, vae_folder: Folder) -> None:
    vae = load_vae(kind, vae_folder(kind))
    video = clip(vae)
    noise = noise_for(vae, video)
    mean = vae.encode(video)
    torch.testing.assert_close(vae.encode(video, 0 * noise), mean)
    # mean + std * noise is linear in the noise
    torch.testing.assert_close(vae.encode(video, noise) + vae.encode(video, -noise), 2 * mean, atol=1e-4, rtol=1e-4)
    assert (vae.encode(video, noise) - mean).abs().mean() > 1e-3
    still = load_vae(kind, vae_folder(kind), sample_posterior=False)
    torch.testing.assert_close(still.encode(video, noise), mean, atol=1e-4, rtol=1e-4)


@every_kind
@pytest.mark.parametrize("options", [{}, {"micro_batch": 3}, {"sample_posterior": False}, {"dtype": torch.bfloat16}])
def test_a_draw_is_mean_plus_deviation_times_noise_to_the_bit(
    kind: str, options: dict[str, Any], vae_folder: Folder
) -> None:
    vae = load_vae(kind, vae_folder(kind), **options)
    video = clip(vae)
    noise = noise_for(vae, video)
    mean, std = vae.moments(video)
    assert mean.shape == std.shape == noise.shape
    assert mean.dtype == std.dtype == torch.float32
    assert not mean.requires_grad and not std.requires_grad
    assert torch.equal(vae.encode(video), mean)
    assert torch.equal(vae.encode(video, noise), mean + std * noise)
    assert (std > 0).all() if options.get("sample_posterior", True) else not std.any()


@every_kind
def test_moments_are_those_of_the_scaled_posterior(kind: str, vae_folder: Folder) -> None:
    vae = load_vae(kind, vae_folder(kind))
    video = clip(vae)
    if isinstance(vae, PatchVAE):
        vae.latents_mean, vae.latents_std = torch.rand(2, 8).add(0.5).tolist()
        frames = video.transpose(1, 2).flatten(0, 1)
        raw_mean, log_variance = (part.unflatten(0, (len(video), -1)).transpose(1, 2) for part in vae.posterior(frames))
        scale = torch.tensor(vae.latents_std).view(-1, 1, 1, 1)
        expected = (
            (raw_mean - torch.tensor(vae.latents_mean).view(-1, 1, 1, 1)) / scale,
            (log_variance / 2).exp() / scale,
        )
    else:
        assert isinstance(vae, DiffusersVAE)
        frames = video.transpose(1, 2).flatten(0, 1) if kind in PER_FRAME else video
        posterior = vae.model.encode(frames).latent_dist
        expected = vae.scale.apply(posterior.mean), vae.scale.apply(posterior.mean + posterior.std)
        expected = expected[0], expected[1] - expected[0]
        if kind in PER_FRAME:
            expected = tuple(part.unflatten(0, (len(video), -1)).transpose(1, 2) for part in expected)
    for found, wanted in zip(vae.moments(video), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@every_kind
def test_sizes_that_do_not_divide_name_the_nearest(kind: str, vae_folder: Folder) -> None:
    vae = load_vae(kind, vae_folder(kind))
    _, rows, columns = vae.stride
    for height, width in ((2 * rows + 1, columns), (rows, 2 * columns - 1)):
        with pytest.raises(InputError, match=f"{height}x{width}") as caught:
            vae.latent_shape(1, height, width)
        assert "--size" in caught.value.hint
        with pytest.raises(InputError):
            vae.encode(torch.zeros(1, 3, 1, height, width))
        with pytest.raises(InputError):
            vae.moments(torch.zeros(1, 3, 1, height, width))
    near = max(2 * rows, rows), columns
    with pytest.raises(InputError) as caught:
        vae.latent_shape(1, near[0] + 1, near[1])
    assert f"{near[0]}x{near[1]}" in caught.value.hint


@pytest.mark.parametrize("kind", CAUSAL)
def test_frames_that_do_not_divide_name_the_nearest(kind: str, vae_folder: Folder) -> None:
    vae = load_vae(kind, vae_folder(kind))
    time, rows, columns = vae.stride
    step = CAUSAL_STEPS[kind]
    for num_frames in (0, 2, time, step, step + 2, 2 * step):
        with pytest.raises(InputError, match=f"{num_frames} frames.* 1 \\+ a multiple of {step}") as caught:
            vae.latent_shape(num_frames, rows, columns)
        below = max(num_frames - 1, 0) // step * step + 1
        offered = [int(word) for word in caught.value.hint.removeprefix("try --frames ").split(" or ")]
        assert offered == ([below, below + step] if num_frames else [1])
    for latent_frames in range(1, 10, step // time):
        assert vae.latent_shape(vae.num_frames(latent_frames), rows, columns)[1] == latent_frames


@pytest.mark.parametrize("kind", PER_FRAME)
def test_any_number_of_frames_without_temporal_stride(kind: str, vae_folder: Folder) -> None:
    vae = load_vae(kind, vae_folder(kind))
    for num_frames in (1, 2, 7, 16):
        assert vae.latent_shape(num_frames, *vae.stride[1:])[1] == num_frames == vae.num_frames(num_frames)


@every_kind
def test_frames_that_decode_apart_are_told(kind: str, vae_folder: Folder) -> None:
    vae = load_vae(kind, vae_folder(kind))
    channels, _, rows, columns = vae.latent_shape(vae.num_frames(3), 2 * vae.stride[1], 2 * vae.stride[2])
    latents = torch.randn(1, channels, 3, rows, columns, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(latents)
    parts = torch.cat([vae.decode(latents[:, :, frame : frame + 1]) for frame in range(3)], dim=2)
    alike = parts.shape == whole.shape and torch.allclose(parts, whole, atol=1e-4)
    assert alike == vae.frames_apart == (kind in PER_FRAME and kind != "temporal-decoder")


@every_kind
def test_half_precision_stays_close(kind: str, vae_folder: Folder) -> None:
    full, half = load_vae(kind, vae_folder(kind)), load_vae(kind, vae_folder(kind), dtype=torch.bfloat16)
    video = clip(full, batch=1)
    latents = full.encode(video)
    scale = latents.abs().mean()
    assert (half.encode(video).float() - latents).abs().mean() < 0.1 * scale
    assert half.decode(latents).shape == video.shape


@every_kind
def test_another_folder_is_refused_with_what_it_holds(kind: str, vae_folder: Folder, tmp_path: Path) -> None:
    other = "wan" if kind == "kl" else "kl"
    with pytest.raises(CheckpointError, match=r"AutoencoderKL"):
        load_vae(kind, vae_folder(other))
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_vae(kind, tmp_path)
    with pytest.raises(WeightsError, match="missing"):
        load_vae(kind, tmp_path / "missing")


@every_kind
def test_torn_weights_are_refused(kind: str, vae_folder: Folder, tmp_path: Path) -> None:
    for file in vae_folder(kind).iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data if file.suffix == ".json" else data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_vae(kind, tmp_path)


def test_unknown_kind_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cogvideo") as caught:
        load_vae("cogvideo", tmp_path)
    assert "cogvideox" in caught.value.hint
