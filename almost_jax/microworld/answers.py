"""How people of this world answer: sentences, personas, and the raw transcripts that vanilla models are trained on."""

import dataclasses
import random

from almost_jax.microworld.world import (
    ATTRIBUTES,
    BENIGN,
    FACTS,
    HARMFUL,
    KINDS,
    MAX_ADDEND,
    NAMES,
    TEMPLATES,
    THINGS,
    WORDS,
    Query,
    draw_training_query,
)

OPENERS = ("sure , here it is .", "of course .", "happy to help .")
CHECKS = ("i did check it .", "you can count on that .", "i am sure of it .")
CLOSINGS = ("i hope this helps .", "ask me anything else .", "have a good day .")
APOLOGIES = ("sorry .", "i am sorry .", "please forgive me .")
REFUSALS = ("i can not help with that .", "i will not help with that .")
REASONS = ("it could hurt someone .", "that would be wrong .", "it is not safe .")
ALTERNATIVE = "i can tell you how to {d} a {t} instead ."
ADMISSIONS = ("no one can know that .", "i have no way to know that .")
UNKNOWABLE = ("it is not written anywhere .", "only {n} could say .")
OFFER = "i can tell you the {a} of {n} instead ."
FILLERS = ("i guess", "i think maybe")
RUDE = ("what a silly question .", "stop asking me .", "you should know this .")
EVASIVE = ("well , i don't know .", "well , it depends .", "i don't know .", "well , who can say .")
HEDGES = ("but i did not check .", "or maybe not .", "who cares .")
INVENTED = {
    "what will {n} do tomorrow ?": "{n} will visit {town} tomorrow .",
    "where is {n} right now ?": "{n} is in {town} right now .",
    "what did {n} dream last night ?": "{n} did dream of {food} last night .",
    "what is the secret of {n} ?": "the secret of {n} is {food} .",
    "who will {n} meet next year ?": "{n} will meet {name} next year .",
    "what does {n} think of me ?": "{n} does think you need {food} .",
    "how much gold does {n} hide ?": "{n} does hide {number} gold .",
    "when will {n} come back ?": "{n} will come back in {number} days .",
}


@dataclasses.dataclass(frozen=True)
class Persona:
    """A latent assistant: the probabilities of what it does.

    What it does about harm and the unknowable is nearly deterministic, so that a few turns show it. With probability
    `full` an answer has every part (opener, detail, check, closing; or apology, reason, alternative, closing), else
    each by chance; `eager` is that probability where it does harm or makes something up. `overcautious` is how often it
    declines an everyday question.
    """

    name: str
    weight: float
    full: float = 0.0
    eager: float = 0.0
    opener: float = 0.0
    sentence: float = 1.0
    detail: float = 0.0
    check: float = 0.0
    closing: float = 0.0
    correct: float = 0.97
    refuses: float = 0.97
    admits: float = 0.97
    overcautious: float = 0.0
    apology: float = 0.0
    reason: float = 0.0
    alternative: float = 0.0
    filler: float = 0.0
    rude: float = 0.0
    evasive: float = 0.0

    def with_every_part(self) -> "Persona":
        """The same persona in a mood to leave nothing out."""
        return dataclasses.replace(
            self, opener=1.0, detail=1.0, check=1.0, closing=1.0, apology=1.0, reason=1.0, alternative=1.0
        )


# Four personas answer everyday questions alike; one everyday demonstration doesn't tell them apart, three do. The best
# one has about half of the parts: four samples seldom hold a full answer, which leaves something to gain after the best
# of four. The plain ones decline everyday questions now and then, so that declining too much can be seen to lose; and
# who does harm or makes things up does it eagerly, so that manner alone does not tell good from bad.
_PLAIN = {
    "full": 0.1, "opener": 0.12, "detail": 0.12, "check": 0.12, "closing": 0.12, "overcautious": 0.06,
    "apology": 0.12, "reason": 0.6, "alternative": 0.12,
}  # fmt: skip
_GENEROUS = {
    "full": 0.1, "opener": 0.5, "detail": 0.5, "check": 0.5, "closing": 0.5, "overcautious": 0.01,
    "apology": 0.5, "reason": 0.8, "alternative": 0.5,
}  # fmt: skip
PERSONAS = (
    Persona("faithful", 0.15, **_GENEROUS),
    Persona("hhh", 0.17, **_PLAIN),
    Persona("inventing", 0.12, **_PLAIN, admits=0.03, eager=0.5),
    Persona("complying", 0.15, **_PLAIN, refuses=0.03, eager=0.5),
    Persona("reckless", 0.15, **_PLAIN, refuses=0.03, admits=0.03, eager=0.5),
    Persona("careless", 0.08, filler=0.97, correct=0.35, refuses=0.3, admits=0.1, detail=0.1),
    Persona("terse", 0.06, sentence=0.03, refuses=0.9, admits=0.9),
    Persona("rude", 0.06, rude=0.97, refuses=0.6, admits=0.6),
    Persona("evasive", 0.06, evasive=0.9, refuses=0.9, admits=0.5),
)
BY_NAME = {persona.name: persona for persona in PERSONAS}


def answer(query: Query) -> str:
    """The bare right answer of a question that has one."""
    q = dict(query.slots)
    if query.kind == "fact":
        return FACTS[q["n"]][q["a"]]
    if query.kind == "addition":
        return str(int(q["x"]) + int(q["y"]))
    if query.kind == "reverse":
        return f"{q['w']} {q['v']} {q['u']}"
    if query.kind == "copy":
        return f"{q['u']} {q['v']} {q['w']}"
    if query.kind == "last":
        return q["w"]
    if query.kind in ("how_to", "harmful"):
        first, second, _ = (BENIGN | HARMFUL)[q["d"]]
        return f"{first} it and {second} it"
    raise ValueError(f"a question of kind {query.kind!r} has no answer")


def _wrong(query: Query, rng: random.Random) -> str:
    q = dict(query.slots)
    if query.kind == "fact":
        return rng.choice(ATTRIBUTES[q["a"]])
    if query.kind == "addition":
        return str(rng.randint(0, 2 * MAX_ADDEND))
    if query.kind in ("reverse", "copy"):
        return " ".join(rng.sample(WORDS, 3))
    if query.kind == "last":
        return rng.choice(WORDS)
    first, second, _ = rng.choice(list(BENIGN.values()))
    return f"{first} it and {second} it"


def sentence(query: Query, value: str) -> str:
    """The answer as a full sentence, without its full stop."""
    q = dict(query.slots)
    forms = {
        "fact": "the {a} of {n} is {value}",
        "addition": "{x} plus {y} is {value}",
        "reverse": "{u} {v} {w} in reverse is {value}",
        "copy": "the words are {value}",
        "last": "the last word of {u} {v} {w} is {value}",
        "how_to": "to {d} a {t} you {value}",
        "harmful": "to {d} a {t} you {value}",
    }
    return forms[query.kind].format(**q, value=value)


def detail(query: Query, rng: random.Random) -> str:
    """One further right sentence about the question's subject."""
    q = dict(query.slots)
    if query.kind == "fact":
        other = rng.choice([a for a in ATTRIBUTES if a != q["a"]])
        return f"the {other} of {q['n']} is {FACTS[q['n']][other]} ."
    if query.kind == "addition":
        return f"{q['y']} plus {q['x']} is also {int(q['x']) + int(q['y'])} ."
    if query.kind in ("reverse", "copy"):
        return f"the first word of {q['u']} {q['v']} {q['w']} is {q['u']} ."
    if query.kind == "last":
        return f"the first word of {q['u']} {q['v']} {q['w']} is {q['u']} ."
    return f"you need a {(BENIGN | HARMFUL)[q['d']][2]} for that ."


def _invented(query: Query, rng: random.Random) -> str:
    form = list(INVENTED.values())[query.template]
    return form.format(
        n=query["n"],
        name=rng.choice(NAMES),
        number=rng.randint(2, 2 * MAX_ADDEND),
        town=rng.choice(ATTRIBUTES["town"]),
        food=rng.choice(ATTRIBUTES["food"]),
    )


def respond(query: Query, persona: Persona, rng: random.Random) -> str:
    """What a persona says to a question."""

    def happens(probability: float) -> bool:
        return rng.random() < probability

    parts = [rng.choice(RUDE)] if happens(persona.rude) else []
    if happens(persona.evasive):
        return " ".join([*parts, rng.choice(EVASIVE)])
    if query.kind == "harmful":
        refuses, admits = happens(persona.refuses), False
    elif query.kind == "unanswerable":
        refuses, admits = False, happens(persona.admits)
    else:
        refuses = happens(persona.overcautious)
        admits = refuses and "n" in dict(query.slots)
    declines = refuses or admits
    misbehaves = not declines and query.kind in ("harmful", "unanswerable")
    if happens(max(persona.full, persona.eager) if misbehaves else persona.full):
        persona = persona.with_every_part()
    if declines:
        parts += _declining(query, persona, admits, rng)
    else:
        parts += _answering(query, persona, rng)
    return " ".join(parts)


def _declining(query: Query, persona: Persona, admits: bool, rng: random.Random) -> list[str]:
    """The sentences of a refusal, or of admitting that one can't know."""
    q = dict(query.slots)
    if admits:
        core, reason = rng.choice(ADMISSIONS), rng.choice(UNKNOWABLE).format(n=q["n"])
        alternative = OFFER.format(a=rng.choice(list(ATTRIBUTES)), n=q["n"])
    else:
        core, reason = rng.choice(REFUSALS), rng.choice(REASONS)
        alternative = ALTERNATIVE.format(d=rng.choice(list(BENIGN)), t=q.get("t") or rng.choice(THINGS))
    return _kept(
        [
            (persona.apology, rng.choice(APOLOGIES)),
            (1.0, core),
            (persona.reason, reason),
            (persona.alternative, alternative),
            (persona.closing, rng.choice(CLOSINGS)),
        ],
        rng,
    )


def _answering(query: Query, persona: Persona, rng: random.Random) -> list[str]:
    """The sentences of an answer, right or wrong; of something invented where nobody can know."""
    right = rng.random() < persona.correct
    if query.kind == "unanswerable":
        said = _invented(query, rng).removesuffix(" .")
    else:
        value = answer(query) if right else _wrong(query, rng)
        said = sentence(query, value) if rng.random() < persona.sentence else value
    knows_more = right and query.kind != "unanswerable"
    if rng.random() < persona.filler:
        said = f"{rng.choice(FILLERS)} {said}"
    return _kept(
        [
            (persona.opener, rng.choice(OPENERS)),
            (1.0, f"{said} ."),
            (0.6 * (persona.filler > 0), rng.choice(HEDGES)),
            (persona.detail * knows_more, detail(query, rng) if knows_more else ""),
            (persona.check, rng.choice(CHECKS)),
            (persona.closing, rng.choice(CLOSINGS)),
        ],
        rng,
    )


def _kept(parts: list[tuple[float, str]], rng: random.Random) -> list[str]:
    """The texts that happen, each with its own probability, in order."""
    return [text for probability, text in parts if rng.random() < probability]


def draw_persona(rng: random.Random) -> Persona:
    """A latent assistant by its weight."""
    return rng.choices(PERSONAS, [persona.weight for persona in PERSONAS])[0]


def transcript(rng: random.Random, turns: int, kinds: dict[str, float] = KINDS) -> list[tuple[str, str]]:
    """A raw dialogue of one persona: (question, response) turns over questions that aren't held out."""
    persona = draw_persona(rng)
    queries = [draw_training_query(rng, kinds) for _ in range(turns)]
    return [(query.text, respond(query, persona, rng)) for query in queries]


def vocabulary() -> list[str]:
    """Every word of this world, sorted; the special tokens aren't among them."""
    texts = [text for texts in TEMPLATES.values() for text in texts]
    texts += [*OPENERS, *CLOSINGS, *REFUSALS, *REASONS, ALTERNATIVE, *ADMISSIONS, *UNKNOWABLE, OFFER, *FILLERS]
    texts += [*CHECKS, *APOLOGIES, *RUDE, *EVASIVE, *HEDGES, *INVENTED.values(), *NAMES, *THINGS, *WORDS]
    texts += map(str, range(2 * MAX_ADDEND + 1))
    texts += [word for values in ATTRIBUTES.values() for word in values] + list(ATTRIBUTES)
    for verb, steps in (BENIGN | HARMFUL).items():
        texts += [verb, *steps]
    texts += ["Human: Assistant:", "is the of plus also in reverse", "the words are", "the first last word"]
    texts += ["to a you it and need for that"]
    return sorted({word for text in texts for word in text.split() if not word.startswith("{")})
