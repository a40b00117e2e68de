"""A conversation with a model: template, cache, stops, a context that overflows. Nothing of terminals.

The key-value cache is kept between turns. The next prompt is rendered from the whole conversation, compared token by
token with what the cache was computed from, and the cache is cut back to what they share: usually everything but the
new message, and never anything that the template would have written differently (Qwen3's drops old thoughts).

When the conversation no longer fits, its oldest exchanges go, never the system prompt, and the reply says how many.
A model without a chat template continues text as it stands.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from qwen_prime_wrapper import stop_ids

_RESERVE = 8
"""An answer is to find at least one part in so many of the context free, before old exchanges are dropped for it."""


class ChatError(RuntimeError):
    """A message that cannot be answered."""


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens; None where the model's own generation config decides."""

    temperature: float | None = None
    """0 takes the likeliest token."""
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int = 1024

    def config(self, model: PreTrainedModel, stops: list[int], pad: int, limit: int) -> GenerationConfig:
        """The model's generation config with these changes, for at most ``limit`` tokens."""
        config = copy.deepcopy(model.generation_config) or GenerationConfig()
        for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
            if (value := getattr(self, name)) is not None:
                setattr(config, name, value)
        if self.temperature is not None or self.top_p is not None or self.top_k is not None:
            config.do_sample = self.temperature != 0
        config.do_sample = bool(config.do_sample)
        if not config.do_sample:
            # transformers warns of settings that greedy search does not read.
            config.temperature = config.top_p = config.top_k = None
        config.max_length, config.max_new_tokens = None, min(limit, self.max_new_tokens)
        config.eos_token_id, config.pad_token_id = stops, pad
        return config


@dataclass
class Reply:
    """An answer and what it took.

    Attributes:
        end: ``stop`` (the model ended its turn), ``length``, ``context`` (no room left) or ``interrupted``.
        tokens: generated, the stop token included.
        prompt_tokens, reused_tokens: of the rendered conversation, and of them from the cache.
        prompt_seconds: until the first token; ``seconds`` from there.
        dropped: old exchanges that made room.
    """

    text: str = ""
    end: str = "stop"
    tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    dropped: int = 0

    @property
    def speed(self) -> float:
        """Tokens a second after the first; 0 where there was no second."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else 0.0


class _Stream(BaseStreamer):
    """Turns ids into text as soon as they make whole characters, and notes the time of the first."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None]) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.emit = emit
        self.ids: list[int] = []
        self.text = ""
        self.first: float | None = None
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """One step's token; the first call brings the prompt."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        if self.first is None:
            self.first = time.perf_counter()
        for token in value.reshape(-1).tolist():
            self.ids.append(token)
            piece = self.decoder.step(self.backend, token)
            if piece:
                self.text += piece
                self.emit(piece)

    def end(self) -> None:
        """Nothing to flush: bytes of an unfinished character are no text."""


class _Stopper(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stopped(), device=input_ids.device)


@dataclass
class Chat:
    """One model's side of a conversation; :meth:`ask` mutates messages and cache."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache: DynamicCache | None = None
        self.cached: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self._forget_cache()

    def _forget_cache(self) -> None:
        self.cache, self.cached = None, []

    @property
    def limit(self) -> int:
        """Tokens that the model's context holds."""
        return int(self.model.config.max_position_embeddings)

    @property
    def stops(self) -> list[int]:
        """Ids that end an answer, see :func:`qwen_prime_wrapper.stop_ids`."""
        return stop_ids(self.model, self.tokenizer)

    def render(self) -> list[int]:
        """Token ids of the conversation, up to where the answer begins."""
        if self.tokenizer.chat_template is None:
            text = "".join(message["content"] for message in self.messages)
            return list(self.tokenizer(text)["input_ids"])
        return list(
            self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )

    def _fit(self) -> tuple[list[int], int]:
        """The rendered conversation and how many old exchanges had to go (dropped from ``messages``)."""
        dropped = 0
        wanted = min(self.sampling.max_new_tokens, max(1, self.limit // _RESERVE))
        while True:
            ids = self.render()
            if len(ids) + wanted <= self.limit:
                return ids, dropped
            first = 1 if self.messages[0]["role"] == "system" else 0
            users = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
            if len(users) < 2:
                if len(ids) < self.limit:
                    return ids, dropped
                raise ChatError(
                    f"the message makes a prompt of {len(ids)} tokens, the context holds {self.limit}: shorten it"
                )
            del self.messages[first : users[1]]
            dropped += 1

    def _reuse(self, ids: list[int]) -> int:
        """Cut the cache to what it shares with ``ids``, or begin a new one; at least one token is left to compute."""
        shared = 0
        for mine, theirs in zip(self.cached, ids[:-1], strict=False):
            if mine != theirs:
                break
            shared += 1
        if self.cache is None or shared == 0:
            self.cache, shared = DynamicCache(config=self.model.config), 0
        elif surplus := self.cache.get_seq_length() - shared:
            try:
                # Negative: so many tokens fewer.
                self.cache.crop(-surplus)
            except RuntimeError:
                # Past its window a sliding layer has forgotten what it would go back to; others may be cut already.
                self.cache, shared = DynamicCache(config=self.model.config), 0
        return shared

    @torch.no_grad()
    def ask(
        self, text: str, emit: Callable[[str], None] = lambda _: None, stopped: Callable[[], bool] = lambda: False
    ) -> Reply:
        """Answer a message.

        Args:
            emit: gets the answer piece by piece.
            stopped: asked after each token; true ends the answer, which is kept as far as it came.

        Raises:
            ChatError: the message does not fit into the context; the conversation is as before.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            ids, dropped = self._fit()
        except ChatError:
            self.messages = before
            raise
        reused = self._reuse(ids)
        stream = _Stream(self.tokenizer, emit)
        stops = self.stops
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else stops[0] if stops else 0
        room = self.limit - len(ids)
        prompt = torch.tensor([ids], device=self.model.device)
        interrupted, began = False, time.perf_counter()
        try:
            self.model.generate(  # type: ignore[operator]
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=self.cache,
                generation_config=self.sampling.config(self.model, stops, pad, room),
                streamer=stream,
                stopping_criteria=StoppingCriteriaList([_Stopper(stopped)]),
            )
            assert self.cache is not None
            self.cached = (ids + stream.ids)[: self.cache.get_seq_length()]
        except KeyboardInterrupt:
            # In the middle of a forward pass: nobody can say which layers' caches are longer by a token.
            interrupted = True
            self._forget_cache()
        except BaseException:
            self.messages = before
            self._forget_cache()
            raise
        ended = time.perf_counter()
        first = stream.first or ended
        self.messages.append({"role": "assistant", "content": stream.text})
        if stream.ids and stream.ids[-1] in stops:
            end = "stop"
        elif interrupted or stopped():
            end = "interrupted"
        else:
            end = "context" if len(stream.ids) >= room else "length"
        return Reply(
            text=stream.text,
            end=end,
            tokens=len(stream.ids),
            prompt_tokens=len(ids),
            reused_tokens=reused,
            prompt_seconds=first - began,
            seconds=ended - first,
            dropped=dropped,
        )
