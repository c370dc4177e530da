"""Continues many prompts at once, over one paged cache.

    engine = Engine(generator.model, generator.tokenizer)
    for completion in engine.generate(["The ", "A "], SamplingParams(max_new_tokens=50)):
        print(completion.text)

In each iteration the `Scheduler` chooses the tokens to compute, the `Runner` computes them in one forward pass, the
`Sampler` draws the next tokens, and the `Engine` gives them to their requests. What a request draws depends on its own
prompt, settings and seed, and not on what runs beside it. Equal prompts with equal seeds that are given together are
numbered, so that they draw different texts.
"""

import itertools
import time
from collections.abc import Iterator, Sequence

import torch

from fastgpt.config.fields import validate
from fastgpt.config.generation import SPECULATION, SamplingParams
from fastgpt.errors import UsageError
from fastgpt.generation.compiled_decoder import CompiledDecoder
from fastgpt.generation.in_flight import Output, Request, Sink
from fastgpt.generation.ngram import NgramProposer
from fastgpt.generation.plan import Chunk, LastToken, Plan, Sample
from fastgpt.generation.random_stream import Occurrences, prompt_digest, stream_key
from fastgpt.generation.request import Completion, Piece, Prompt, Stats, prompt_tokens
from fastgpt.generation.runner import Runner
from fastgpt.generation.sampler import Drawn, Sampler
from fastgpt.generation.scheduler import Scheduler
from fastgpt.model.gpt import GPT
from fastgpt.model.kv_cache import PagedCache, pages_that_fit
from fastgpt.system.device import send, synchronize
from fastgpt.system.units import counted
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.tokenizer.detokenizer import Detokenizer

DRAFTS = 5  # tokens that a guess has at most


class Engine:
    """Continues many prompts at once.

    Attributes:
        stats: counts and times so far.
        scheduler: holds the waiting and the running sequences; `scheduler.allocator` holds the pages.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer | None = None,
        *,
        max_batch: int = 64,
        max_batch_tokens: int = 2048,
        page_size: int = 16,
        kv_memory: int | None = None,
        prefix_cache: bool = True,
        speculate: str = "none",
        slide: bool = False,
        compile: bool = False,
        decoder: CompiledDecoder | None = None,
        cuda_graphs: bool = True,
    ):
        """
        Args:
            model: in evaluation mode, on any device.
            tokenizer: for prompts that are text. Without one, prompts are token ids, and completions have no text.
            max_batch: sequences that run at once.
            max_batch_tokens: tokens of one forward pass; longer prompts are read in chunks.
            page_size: positions in a page.
            kv_memory: bytes for pages, of which there are at most 262,144; default: 80% of the free memory of a GPU,
                25% elsewhere.
            prefix_cache: compute the common beginning of prompts once, and keep it as long as there is room.
            speculate: "ngram" guesses tokens from the text itself and checks them in one forward pass. The
                continuations stay the same.
            slide: go on past block_size with the last block_size tokens, each token at the cost of a prefill.
                Otherwise a request ends there, and a longer prompt is an error.
            compile: torch.compile the forward pass.
            decoder: the compiled model (CPU only), used while a single sequence runs.
            cuda_graphs: on CUDA, capture forward passes that only decode.

        Raises:
            UsageError: a setting outside its limits, memory for less than one page, or more than is free.
        """
        for name, value in (("max_batch", max_batch), ("max_batch_tokens", max_batch_tokens), ("page_size", page_size)):
            if value < 1:
                raise UsageError(f"`{name}` {value} must be at least 1")
        if speculate not in SPECULATION:
            raise UsageError(f"`speculate` {speculate!r} is not one of {', '.join(SPECULATION)}")
        self.model, self.tokenizer, self.slide, self.speculate = model, tokenizer, slide, speculate
        config, device, dtype = model.config, model.device, model.dtype
        self.block_size, self.vocab_size = config.block_size, config.vocab_size or 0
        pages = pages_that_fit(config, page_size, dtype, device, kv_memory)
        self.cache = PagedCache(config, pages, page_size, device=device, dtype=dtype, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(
            self.cache,
            self.block_size,
            max_batch=max_batch,
            max_batch_tokens=max_batch_tokens,
            drafts=DRAFTS,
        )
        self.runner = Runner(
            model, self.cache, max_batch=max_batch, compile=compile, decoder=decoder, graphs=cuda_graphs
        )
        self.sampler = Sampler(max_batch, self.vocab_size, device)
        self.stats = Stats()
        self._submitted = 0
        self._requests: dict[int, Request] = {}  # those that are not finished, by number
        self._outputs: dict[Sample, Output] = {}  # of all samples that are not finished
        self._slots: list[Sample | None] = [None] * max_batch  # the sample whose settings the sampler holds, by slot
        self._ready = Sink()  # for requests of `submit`

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to compute or to return."""
        return bool(self._requests or self._ready.pieces)

    @property
    def queued(self) -> int:
        """The number of continuations that wait for a place in the batch."""
        return len(self._outputs) - len(self.scheduler.running)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """The continuations of all prompts, in their order, `num_samples` of each; `index` is the prompt's place.

        See `stream` and `submit`.
        """
        done = [piece.completion for piece in self.stream(prompts, params) if piece.completion]
        return sorted(done, key=lambda completion: (completion.index, completion.sample))

    def stream(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        wanted: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[Piece]:
        """The pieces of all continuations, as they come; `index` is the prompt's place in `prompts`.

        Closing the iterator cancels what is not finished. Several streams may be read in turns.

        Args:
            prompts: text or token ids.
            params: for all prompts, or for each.
            wanted: the numbers of the continuations to make of each prompt; default all. A prompt without any still
                counts among equal ones, so that the others draw the same as beside it.

        Raises:
            UsageError: settings outside their limits, or not as many settings as prompts. That is checked at once; the
                prompts are submitted when the iterator is asked for its first piece.
        """
        if isinstance(prompts, str):
            raise UsageError("prompts must be a list; pass [prompt] for a single one")
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise UsageError(
                f"{counted(len(each), 'setting')} for {counted(len(prompts), 'prompt')}; give one, or one for each"
            )
        for one in {id(one): one for one in each}.values():
            validate(one)
        numbers = [range(one.num_samples) for one in each] if wanted is None else wanted
        return self._pieces(prompts, each, numbers)

    def _pieces(
        self, prompts: Sequence[Prompt], each: Sequence[SamplingParams], wanted: Sequence[Sequence[int]]
    ) -> Iterator[Piece]:
        sink = Sink()
        equal = Occurrences()
        own = [
            self._submit(prompt, one, index, sink, numbers, equal)
            for index, (prompt, one, numbers) in enumerate(zip(prompts, each, wanted, strict=True))
        ]
        try:
            while True:
                yield from sink.take()
                if not sink.pieces:  # the engine may have been called in between
                    if not sink.open:
                        return
                    self._advance()
        finally:
            for request in own:
                self._cancel(request)

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Put a request at the end of the queue; returns its number, which is the `index` of its pieces.

        A prompt that cannot be continued ends at once with "error" (unknown characters or token ids, longer than
        block_size, more pages than there are). Other requests are not affected.

        Raises:
            UsageError: settings outside their limits.
        """
        params = params or SamplingParams()
        validate(params)
        numbers = range(params.num_samples)
        return self._submit(prompt, params, self._submitted, self._ready, numbers, Occurrences()).number

    def _submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        index: int,
        sink: Sink,
        wanted: Sequence[int],
        equal: Occurrences,
    ) -> Request:
        """`index`: of its pieces, which go to `sink`; `equal`: numbers equal prompts that are given together."""
        request = Request(self._submitted, index, sink, prompt, params, time.perf_counter())
        self._submitted += 1
        try:
            tokens = prompt_tokens(prompt, self.tokenizer, self.vocab_size)
            digest = prompt_digest(tokens)
            occurrence = equal.number(digest, params.seed)
            self._check(tokens, params)
        except UsageError as error:
            if wanted:
                request.refuse(wanted[0], str(error))
            return request
        if not wanted:
            return request
        if self.slide and not params.penalizes:
            # Nothing reads the tokens before the window, and each continuation would copy them.
            tokens = tokens[-self.block_size :]
        length = len(tokens) + params.max_new_tokens
        if not self.slide:
            length = min(length, self.block_size + 1)
        for number in wanted:
            key = stream_key(digest, params.seed, occurrence, number)
            sample = Sample((request.number, number), tokens, len(tokens), params, key=key)
            if self.speculate == "ngram" and not params.penalizes:  # guesses ignore penalties
                sample.proposer = NgramProposer()
            request.samples[sample] = None
            sink.open += 1
            detokenizer = Detokenizer(self.tokenizer, params.stop, tokens) if self.tokenizer else None
            logprobs = None if params.logprobs is None else []
            told = [] if params.candidates else None
            self._outputs[sample] = Output(request, number, length, params.stop_tokens, detokenizer, logprobs, told)
        self._requests[request.number] = request
        if params.max_new_tokens == 0:
            for sample in list(request.samples):
                self._finish(request, sample, "length")
            return request
        leader, *leader.siblings = request.samples
        self.scheduler.add(leader)
        return request

    def cancel(self, number: int) -> None:
        """End the continuations of a request of `submit`; one that is finished or unknown is ignored.

        To cancel the requests of a stream, close it.
        """
        if request := self._requests.get(number):
            self._cancel(request)

    def _cancel(self, request: Request) -> None:
        for sample in list(request.samples):
            self._finish(request, sample, "cancelled")

    def step(self) -> list[Piece]:
        """Run one forward pass; returns all pieces since the last call.

        After an exception (out of memory, Ctrl-C) every request is still there and is computed again.
        """
        self._advance()
        return self._ready.take()

    def _advance(self) -> None:
        try:
            plan = self.scheduler.plan()
            if plan.chunks:
                began = time.perf_counter()
                turns, drawn = self._compute(plan, began)
                self._count(plan, time.perf_counter() - began)
                self._accept(turns, drawn)
        except BaseException:
            self.scheduler.start_over()
            self._slots = [None] * len(self._slots)  # the sampler may have counted tokens that were not given out
            raise

    def _compute(self, plan: Plan, now: float) -> tuple[Sequence[Chunk | LastToken], Sequence[Drawn]]:
        """Run a forward pass: the chunks that predict, and what was drawn after each one's last token and guesses."""
        logits = self.runner(plan)
        if plan.batch:
            return plan.chunks, self.sampler(logits, plan.batch.slots, plan.batch.generated).to_host()
        turns, logits = self._begin_turns(plan, logits, now)
        if not turns:
            synchronize(self.runner.device)  # so that the measured time is that of this forward pass
            return [], []
        for turn in turns:
            if self._slots[turn.sample.slot] is not turn.sample:
                self._give_slot(turn.sample)
        slots = [turn.sample.slot for turn in turns for _ in range(turn.rows)]
        indices = [turn.sample.generated + i for turn in turns for i in range(turn.rows)]
        return turns, self.sampler(logits, slots, indices).to_host()

    def _begin_turns(
        self, plan: Plan, logits: torch.Tensor, now: float
    ) -> tuple[list[Chunk | LastToken], torch.Tensor]:
        """The chunks that predict, with one for each continuation that forks from them, and their logits."""
        turns: list[Chunk | LastToken] = []
        begins, end = [], 0
        for chunk in plan.chunks:
            if chunk.reading:
                request = self._requests[chunk.sample.order[0]]
                request.started = request.started or now
            if chunk.rows:
                turns.append(chunk)
                begins.append(end)
                if chunk.sample.siblings:
                    forked = self._start_siblings(chunk.sample)
                    turns += [Chunk(sibling, 0, [], [], True, 1) for sibling in forked]
                    begins += [end] * len(forked)
                end += chunk.rows
        rows = [begin + i for turn, begin in zip(turns, begins, strict=True) for i in range(turn.rows)]
        if len(rows) > end:  # continuations of one prompt share a row
            logits = logits[send(torch.tensor(rows), self.runner.device)]
        return turns, logits

    def _start_siblings(self, leader: Sample) -> list[Sample]:
        """Fork the continuations that waited for this one; those without a free slot go to the front of the queue."""
        forked = []
        while leader.siblings and self.scheduler.fork(leader, leader.siblings[0]):
            forked.append(leader.siblings.pop(0))
        self.scheduler.put_back(leader.siblings)
        leader.siblings.clear()
        return forked

    def _give_slot(self, sample: Sample) -> None:
        """Give the sampler the settings of the sample that has got a slot."""
        self._slots[sample.slot] = sample
        end = sample.prompt_length
        self.sampler.begin(sample.slot, sample.params, sample.tokens[:end], sample.tokens[end:], key=sample.key)

    def _accept(self, turns: Sequence[Chunk | LastToken], drawn: Sequence[Drawn]) -> None:
        """Give each sequence its new tokens, up to the first wrong guess or the token that ends it."""
        decoded, each = 0, iter(drawn)
        new = tuple.__new__  # as Piece(...), in a fraction of its time
        for turn, latest in zip(turns, each, strict=False):
            sample, draft = turn.sample, turn.draft
            output = self._outputs[sample]
            request, reason = output.request, output.append(sample, latest, self.stats)
            if draft:
                for guess, after in zip(draft, list(itertools.islice(each, len(draft))), strict=True):
                    if reason or guess != latest.token:
                        break
                    self.stats.accepted += 1
                    reason, latest = output.append(sample, after, self.stats), after
                self.stats.proposed += len(draft)
            if not turn.reading:
                decoded += len(output.tokens)
            if reason:
                self._finish(request, sample, reason)
                continue
            if draft and sample.table is not None:
                self.scheduler.allocator.truncate(sample.table, len(sample.tokens) - 1)
            request.sink.pieces.append(new(Piece, (request.index, output.number, output.text, output.tokens, None)))
            output.text, output.tokens = "", []
        self.stats.decode_tokens += decoded

    def _finish(self, request: Request, sample: Sample, reason: str) -> None:
        self.scheduler.drop(sample)
        self._outputs[sample].finish(sample, reason, self.stats)
        del self._outputs[sample]
        if not request.samples:
            del self._requests[request.number]

    def _check(self, tokens: Sequence[int], params: SamplingParams) -> None:
        """Raises `UsageError` for a request that can never run, even alone."""
        if params.stop and self.tokenizer is None:
            raise UsageError("a stop text needs a tokenizer; pass stop_tokens instead")
        if not self.slide and len(tokens) > self.block_size:
            raise UsageError(
                f"the prompt has {counted(len(tokens), 'token')}, and the model's context (block_size) "
                f"{self.block_size:,}; shorten it, or let the window slide"
            )
        allocator = self.scheduler.allocator
        needed = allocator.pages_for(self.scheduler.most_positions(len(tokens), params.max_new_tokens))
        if needed > allocator.pages:
            raise UsageError(
                f"prompt and continuation may need {counted(needed, 'page')} of "
                f"{counted(allocator.page_size, 'token')}, and the cache has {allocator.pages:,}; "
                "raise `kv_memory`, or lower `max_new_tokens`"
            )

    def _count(self, plan: Plan, seconds: float) -> None:
        """Count a forward pass whose tokens have arrived on the host."""
        self.stats.steps += 1
        self.stats.prefill_tokens += plan.read
        self.stats.prefill_seconds += seconds * plan.read / plan.tokens
        self.stats.decode_seconds += seconds * (plan.tokens - plan.read) / plan.tokens
