"""A model class for lm-evaluation-harness: every task that it knows, on models of ours.

    almost-jax lm-eval --model almost_jax --model_args pretrained=runs/NAME/sft/model --tasks lambada_openai

The harness looks a model's name up among those that were registered by import, and imports its own alone; so the
command above imports this module and hands over to the harness's command line. From Python, `import
almost_jax.evaluation.harness` before `lm_eval.simple_evaluate(model="almost_jax", ...)` does the same.

Texts become tokens, are cut to the model's length and are scored as its transformers backend (`hf`) does; tests compare
the two. Needs the extra `eval`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from almost_jax.config import COLDEST, MeshConfig, SamplingConfig
from almost_jax.core.partitioning import exact_products, make_mesh, whole_rows
from almost_jax.errors import InputError
from almost_jax.evaluation.choices import MULTIPLE, fit
from almost_jax.io.models import load_model
from almost_jax.io.transfer import locate
from almost_jax.sampling.engine import Request, generate
from almost_jax.sampling.likelihood import Likelihood, continuation_likelihoods
from almost_jax.sampling.stops import StopStrings
from almost_jax.stages.prompting import engine_settings, sampling_rules

# Requests that are sorted by length, and may share their beginning, together; in batches.
_BATCHES_AT_ONCE = 16
_AUTO_BATCH = 16


@register_model("almost_jax")
class AlmostJax(TemplateLM):
    """A language model of ours behind the harness's interface.

    Arguments, as in `--model_args pretrained=M,dtype=bfloat16`:
        pretrained: a model of ours, a Hugging Face folder or hub name, or a GGUF file.
        dtype: to compute in.
        data, fsdp, tensor: devices along the mesh's axes; -1 takes what is left.
        max_length: tokens that the model reads; its own positions when not given.
        add_bos_token: whether the beginning of text stands before a text; as the tokenizer says when not given.
        prefix_token_id: what the first token of a text is predicted from when there is no context.
        seed: of samples, for tasks that draw.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "float32",
        data: int = -1,
        fsdp: int = 1,
        tensor: int = 1,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """Load the model; `max_batch_size` and `device` are given by the harness and have no meaning here.

        Raises:
            InputError: it can't be loaded, or is a reward model.
        """
        super().__init__()
        try:
            self._mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
        except ValueError as error:
            raise InputError(" ".join(str(error).split())) from error
        self._loaded = load_model(locate(pretrained), self._mesh, dtype)
        if self._loaded.kind != "policy":
            raise InputError(f"model {pretrained!r}: a reward model has no log-probs; expected a language model")
        self.tokenizer = self._loaded.tokenizer.backend
        self.add_bos_token = add_bos_token
        self.max_length = int(max_length or self._loaded.config.max_position_embeddings)
        self._prefix, self._seed = prefix_token_id, seed
        wanted = _AUTO_BATCH if str(batch_size).startswith("auto") else int(batch_size)
        self.batch_size = whole_rows(self._mesh, wanted)

    @property
    def eot_token_id(self) -> int:
        """The end of text."""
        return self._loaded.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the beginning of text, or its end where there is none."""
        if self._prefix is not None:
            return self._prefix
        bos = self._loaded.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's fingerprint, for the harness's caches."""
        return self._loaded.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """The ids of a text, with the tokenizer's own special tokens unless the text begins with that token."""
        given: dict[str, bool] = {}
        if add_special_tokens is not None:
            given = {"add_special_tokens": add_special_tokens}
        elif has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            given = {"add_special_tokens": False}
        elif self.add_bos_token is not None:
            given = {"add_special_tokens": self.add_bos_token}
        ids: list[int] = self.tokenizer.encode(string, **given)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A dialogue as text by the tokenizer's template."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        size = self.batch_size * _BATCHES_AT_ONCE
        for first in tqdm(range(0, len(requests), size), desc="Running loglikelihood requests", disable=disable_tqdm):
            group = requests[first : first + size]
            scored = self._likelihoods([request[1:] for request in group])
            for (texts, *_), one in zip(group, scored, strict=True):
                found.append((one.total, one.greedy))
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-prob of each whole text, in windows of the model's length, each token predicted once."""
        found: list[float] = []
        for request in tqdm(requests, desc="Running rolling requests", disable=disable_tqdm):
            (text,) = request.args
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1),
            )
            found.append(sum(one.total for one in self._likelihoods(list(windows))))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until one of its stop strings, the end of text, or the most tokens."""
        found: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(place)
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        bar = tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm)
        for places in groups.values():
            settings: dict[str, Any] = dict(normalize_gen_kwargs(requests[places[0]].args[1], 256))
            until = handle_stop_sequences(settings["until"], eos=eos)
            room = self.max_length - settings["max_gen_toks"]
            if room < 1:
                raise InputError(
                    f"max_gen_toks {settings['max_gen_toks']}: leaves no room for a prompt; the model reads "
                    f"{self.max_length} tokens"
                )
            prompts = [self.tok_encode(requests[place].args[0])[-room:] for place in places]
            # The end of text is a token of its own.
            stops = [stop for stop in until if stop not in ("", eos)]
            for place, tokens in zip(places, self._continue(places, prompts, settings, stops), strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                found[place] = postprocess_generated_text(text, until, None)
                self.cache_hook.add_partial("generate_until", requests[place].args, found[place])
                bar.update(1)
        bar.close()
        return found

    def _likelihoods(self, pairs: Sequence[Sequence[list[int]]]) -> list[Likelihood]:
        contexts = [fit(context, continuation, self.max_length) for context, continuation in pairs]
        with jax.set_mesh(self._mesh), exact_products(self._loaded.config.dtype):
            return continuation_likelihoods(
                self._loaded.params,
                self._loaded.config,
                contexts,
                [continuation for _, continuation in pairs],
                batch_size=self.batch_size,
                multiple=MULTIPLE,
            )

    def _continue(
        self, places: Sequence[int], prompts: Sequence[Sequence[int]], settings: dict[str, Any], stops: Sequence[str]
    ) -> list[tuple[int, ...]]:
        drawn, temperature = bool(settings.get("do_sample")), float(settings.get("temperature", 1.0))
        sampling = SamplingConfig(
            temperature=temperature if drawn and temperature >= COLDEST else 0.0,
            top_p=float(settings.get("top_p", 1.0)) if drawn else 1.0,
            top_k=int(settings.get("top_k", 0)) if drawn else 0,
            max_new_tokens=int(settings["max_gen_toks"]),
            batch_size=self.batch_size,
        )
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=True)
        asked = [Request(str(place), tuple(prompt)) for place, prompt in zip(places, prompts, strict=True)]
        with jax.set_mesh(self._mesh), exact_products(self._loaded.config.dtype):
            completions = generate(
                self._loaded.params,
                self._loaded.config,
                asked,
                sampling_rules(sampling, (self.eot_token_id,)),
                engine_settings(sampling),
                seed=self._seed,
                prefix_tokens=(),
                stops=StopStrings(tuple(stops), decode) if stops else None,
            )
            return [completion.content for completion in completions]
