"""Logits to tokens, on the device."""

import torch

from fastgpt.config import SamplingParams


class Sampler:
    """Draws the next token of B sequences that share their settings.

    The order is: repetition penalty (Keskar et al., 2019), temperature, top-k (Fan et al., 2018), top-p
    (Holtzman et al., 2020), min-p (Nguyen et al., 2024), draw.
    """

    def __init__(self, params: SamplingParams, prompt: torch.Tensor, vocab_size: int):
        """`prompt`: int64 (B, T), the tokens that the repetition penalty counts from the start."""
        self.params = params
        self.generator = torch.Generator(prompt.device).manual_seed(params.seed)
        self.seen = None
        if params.repetition_penalty != 1.0:
            self.seen = torch.zeros(len(prompt), vocab_size, dtype=torch.bool, device=prompt.device)
            self.seen.scatter_(1, prompt, True)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) -> the next tokens, int64 (B, 1)."""
        logits = logits.float()
        if self.seen is not None:
            penalty = self.params.repetition_penalty
            penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self.seen, penalized, logits)
        if self.params.temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            # Only differences count, and from the top they cannot overflow however low the temperature.
            logits = logits - logits.amax(-1, keepdim=True)
            temperature = max(self.params.temperature, torch.finfo(logits.dtype).tiny)
            probabilities = keep_likely(logits / temperature, self.params).softmax(-1)
            # The largest p / e with e ~ Exp(1) falls on a token with its probability p, without a host sync.
            noise = torch.empty_like(probabilities).exponential_(generator=self.generator)
            noise.clamp_(min=torch.finfo(noise.dtype).tiny)  # a dropped token's 0 / 0 would win
            token = (probabilities / noise).argmax(-1, keepdim=True)
        if self.seen is not None:
            self.seen.scatter_(1, token, True)
        return token


def keep_likely(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Logits (B, V) with -inf where top-k, top-p or min-p drop a token; the likeliest always stays."""
    if params.top_k and params.top_k < logits.shape[-1]:
        least = logits.topk(params.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if params.top_p is not None and params.top_p < 1:
        ordered, order = logits.sort(descending=True)
        share = ordered.softmax(-1)
        beyond = share.cumsum(-1) - share >= params.top_p  # what stands before it already holds top_p
        beyond[:, 0] = False  # where top_p rounds to 0 in float32
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))
    if params.min_p:
        share = logits.softmax(-1)
        least = params.min_p * share.amax(-1, keepdim=True)
        logits = logits.masked_fill(share < least, float("-inf"))
    return logits
