"""The model "nemomodel" of lm-evaluation-harness. Importing this module registers it.

    import lm_eval, nemomodel.infer.harness
    lm_eval.simple_evaluate(model="nemomodel", model_args="path=runs/tiny", tasks=["arc_easy"])

Needs the extra `eval`. Written for lm-eval 0.4.13: what a request means is documented in
lm_eval/api/model.py there; splitting text into context and continuation is that of its
`TemplateLM`, so that scores can be compared with those of its other models.
"""

from collections import defaultdict
from itertools import batched
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

import nemomodel
from nemomodel.infer.scoring import Score, rolling_windows, score_continuations
from nemomodel.infer.text_format import TextFormat, context_length
from nemomodel.infer.until import Settings, generate_until, parse_settings

MAX_NEW_TOKENS = 256
"""Where a task sets no limit; that of the harness's own models."""


@register_model("nemomodel")
class HarnessModel(TemplateLM):
    """A checkpoint of ours or a Hugging Face nemotron_h folder."""

    def __init__(
        self,
        path: str | Path,
        *,
        tokenizer: str | Path | None = None,
        max_length: int | None = None,
        batch_size: int | str = 8,
        dtype: str | None = None,
        device: str = "cpu",
        seed: int = 0,
    ):
        """
        Args:
            tokenizer: tokenizer.json, if it does not lie with the checkpoint.
            max_length: of the inputs of the model (default: `context_length`).
            dtype: bfloat16, float32 or float64; that of the checkpoint when not given.
            seed: of tasks that sample.

        Raises:
            ValueError: no tokenizer, or an argument out of its range.
            CheckpointError, ConfigError: as `nemomodel.load_model`.
        """
        super().__init__()
        self.text = TextFormat.of(path, tokenizer)
        self._max_length = context_length(path) if max_length is None else int(max_length)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r}: must be a number, at least 1")
        if self._max_length < 2:
            raise ValueError(f"max_length={self._max_length}: must be at least 2")
        self.batch_size, self.seed = int(batch_size), int(seed)
        self._device = torch.device(device)
        self.model = nemomodel.load_model(
            path, dtype=getattr(torch, dtype) if dtype else None, device=self._device
        )
        self.text.check_vocabulary(self.model.config.vocab_size)

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        return MAX_NEW_TOKENS

    @property
    def eot_token_id(self) -> int:
        return self.text.end_ids[0]

    @property
    def prefix_token_id(self) -> int:
        return self.text.prefix_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.text.path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self.text.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:

            def done(index: int, score: Score) -> None:
                bar.update()
                if (key := requests[index][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", key, tuple(score))

            scores = score_continuations(
                self.model,
                [(context, continuation) for _, context, continuation in requests],
                batch_size=self.batch_size,
                max_length=self.max_length,
                on_pair=done,
            )
        return [tuple(score) for score in scores]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        owner, pairs = [], []
        for index, request in enumerate(requests):
            (text,) = request.args
            windows = rolling_windows(
                self.tok_encode(text), prefix_id=self.prefix_token_id, max_length=self.max_length
            )
            for context, continuation in windows:
                owner.append(index)
                pairs.append((None, context, continuation))
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)
        for index, (log_probability, _) in zip(owner, scores, strict=True):
            totals[index] += log_probability
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        groups: dict[Settings, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[parse_settings(request.args[1], default_max_new_tokens=MAX_NEW_TOKENS)].append(
                index
            )
        for settings in groups:
            if settings.max_new_tokens >= self.max_length:
                raise ValueError(
                    f"{settings.max_new_tokens} new tokens leave no room for a prompt in "
                    f"max_length={self.max_length}; raise max_length or lower max_gen_toks"
                )
        prompts = [self.tok_encode(r.args[0]) or [self.prefix_token_id] for r in requests]
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for settings, indices in groups.items():
                room = self.max_length - settings.max_new_tokens
                indices.sort(key=lambda index: -len(prompts[index]))
                for batch in batched(indices, self.batch_size):
                    found = generate_until(
                        self.model,
                        [prompts[index][-room:] for index in batch],
                        settings,
                        decode=self.text.decode,
                        stop_ids=self.text.end_ids,
                        # Repeats of one prompt in different batches are to differ.
                        seed=self.seed + batch[0],
                    )
                    for index, text in zip(batch, found, strict=True):
                        texts[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(len(batch))
        return texts
