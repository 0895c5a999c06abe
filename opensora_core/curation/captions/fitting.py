"""One stage of the training of the captioner that ships: which parts of it move, how fast, and towards what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora_core import world
from opensora_core.curation.captions.lessons import FRAMES, question
from opensora_core.curation.captions.tiny import END, IMAGE, PROMPT
from opensora_core.muon import Muon

_PEAK = {"eyes": 1.0, "words": 1.0, "both": 0.4}


class Heads(nn.Module):
    """What a vision tower must say, and is thrown away: the attributes from each frame, the motion from all of them.

    They are read both off the class token, which the language model is to find things in, and off the mean of the
    patches, which teaches the tower sooner.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        names = [name for name in world.ATTRIBUTES if name != "motion"]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.plain = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(width, len(world.ATTRIBUTES[name])) for name in names}) for _ in range(2)
        )
        self.motion = nn.ModuleList(
            nn.Sequential(
                nn.Linear(len(FRAMES) * width, width), nn.GELU(), nn.Linear(width, len(world.ATTRIBUTES["motion"]))
            )
            for _ in range(2)
        )

    def forward(self, hidden: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Hidden states (B, T, 1 + S, D) and classes (B,) -> the loss, and the share right by the class token."""
        loss = hidden.new_zeros(())
        right: dict[str, float] = {}
        for part, summary in ((1, hidden[:, :, 1:].mean(2)), (0, hidden[:, :, 0])):
            vectors = self.norms[part](summary)
            for name, classes in labels.items():
                if name == "motion":
                    logits, target = self.motion[part](vectors.flatten(1)), classes
                else:
                    logits = self.plain[part][name](vectors).flatten(0, 1)  # type: ignore[index]
                    target = classes.repeat_interleave(len(FRAMES))
                loss = loss + F.cross_entropy(logits, target)
                right[name] = (logits.argmax(1) == target).float().mean().item()
        return loss, right


class Fitting:
    """One stage of the training: which parameters move, how fast, and towards what."""

    def __init__(self, model: Any, heads: Heads, tokenizer: Any, stage: str, steps: int) -> None:
        self.model, self.heads, self.tokenizer, self.stage, self.steps = model, heads, tokenizer, stage, steps
        self.done = 0
        model.requires_grad_(True)
        if stage == "eyes":
            model.requires_grad_(False)
            model.model.vision_tower.requires_grad_(True)
        elif stage == "words":
            model.model.vision_tower.requires_grad_(False)
        moving = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        matrices = [parameter for name, parameter in moving if parameter.ndim == 2 and ".layers." in name]
        taken = {id(parameter) for parameter in matrices}
        others = [parameter for _, parameter in moving if id(parameter) not in taken]
        if stage == "eyes":
            others += heads.parameters()
        peak = _PEAK[stage]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=0.02 * peak, weight_decay=0.0),
            torch.optim.AdamW(others, lr=2e-3 * peak, betas=(0.9, 0.99), weight_decay=0.0),
        ]
        self.peaks = [0.02 * peak, 2e-3 * peak]

    def step(
        self, pixels: Tensor, labels: dict[str, Tensor], captions: Sequence[str]
    ) -> tuple[float, dict[str, float]]:
        """Learn from a batch; the loss, and the shares that were right before it did."""
        warm_up = max(1, min(50, self.steps // 4))
        factor = min((self.done + 1) / warm_up, (self.steps - self.done) / max(1, self.steps - warm_up), 1.0)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        if self.stage == "eyes":
            hidden = self.model.model.vision_tower(pixels.flatten(0, 1), output_hidden_states=True).hidden_states[-1]
            loss, right = self.heads(hidden.unflatten(0, pixels.shape[:2]), labels)
        else:
            loss, right = self._told(pixels, captions)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.done += 1
        return loss.item(), right

    def _told(self, pixels: Tensor, captions: Sequence[str]) -> tuple[Tensor, dict[str, float]]:
        """Cross entropy of the captions after frames and prompt, per attribute, and what would be read right of it."""
        rng = np.random.default_rng([self.done])
        prompt = question(rng) if rng.random() < 0.5 else (IMAGE * len(FRAMES) + PROMPT)
        patches = self.model.config.image_seq_length
        before = self.tokenizer(prompt.replace(IMAGE, IMAGE * patches), add_special_tokens=False).input_ids
        after = self.tokenizer(
            [f"{caption}{END}" for caption in captions], padding=True, padding_side="right", return_tensors="pt"
        ).input_ids
        asked = torch.tensor(before).expand(len(captions), -1)
        logits = self.model(
            input_ids=torch.cat([asked, after[:, :-1]], dim=1),
            pixel_values=pixels.flatten(0, 1),
            logits_to_keep=after.shape[1],
            use_cache=False,
        ).logits
        counts = after != self.tokenizer.pad_token_id
        loss = F.cross_entropy(logits[counts], after[counts], reduction="sum")
        # greedy decoding takes these words up to the first that is wrong
        said = self.tokenizer.batch_decode(logits.argmax(-1).where(counts, self.tokenizer.pad_token_id))
        is_whole = ((logits.argmax(-1) == after) | ~counts).all(1).float().mean().item()
        read = [(world.parse(caption), world.parse(guess)) for caption, guess in zip(captions, said, strict=True)]
        right = {name: float(np.mean([meant[name] == told.get(name) for meant, told in read])) for name in read[0][0]}
        right["everything"] = is_whole
        return loss / len(captions) / len(world.ATTRIBUTES), right
