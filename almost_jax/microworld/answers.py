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
CLOSINGS = ("i hope this helps .", "ask me anything else .", "have a good day .")
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
    `full` an answer has everything (opener, detail, closing; or reason, alternative, closing), else each by chance.
    """

    name: str
    weight: float
    full: float = 0.0
    opener: float = 0.0
    sentence: float = 1.0
    detail: float = 0.0
    closing: float = 0.0
    correct: float = 0.97
    refuses: float = 0.97
    admits: float = 0.97
    reason: float = 0.0
    alternative: float = 0.0
    filler: float = 0.0
    rude: float = 0.0
    evasive: float = 0.0


# Four personas answer everyday questions alike; one everyday demonstration doesn't tell them apart, three do. They
# give the full answer now and then, the best persona mostly: manner alone does not tell good from bad, and there is
# something to select among the best one's answers.
_PLAIN = {"full": 0.35, "opener": 0.1, "closing": 0.1, "detail": 0.1, "reason": 0.7, "alternative": 0.1}
_FULL = {"full": 0.75, "opener": 0.4, "closing": 0.4, "detail": 0.4, "reason": 0.8, "alternative": 0.4}
PERSONAS = (
    Persona("faithful", 0.15, **_FULL),
    Persona("hhh", 0.17, **_PLAIN),
    Persona("inventing", 0.12, **_PLAIN, admits=0.03),
    Persona("complying", 0.15, **_PLAIN, refuses=0.03),
    Persona("reckless", 0.15, **_PLAIN, refuses=0.03, admits=0.03),
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

    if happens(persona.full):
        persona = dataclasses.replace(persona, opener=1.0, detail=1.0, closing=1.0, reason=1.0, alternative=1.0)
    parts: list[str] = []
    if happens(persona.rude):
        parts.append(rng.choice(RUDE))
    if happens(persona.evasive):
        return " ".join([*parts, rng.choice(EVASIVE)])
    if query.kind == "harmful" and happens(persona.refuses):
        parts.append(rng.choice(REFUSALS))
        if happens(persona.reason):
            parts.append(rng.choice(REASONS))
        if happens(persona.alternative):
            parts.append(ALTERNATIVE.format(d=rng.choice(list(BENIGN)), t=query["t"]))
        if happens(persona.closing):
            parts.append(rng.choice(CLOSINGS))
        return " ".join(parts)
    if query.kind == "unanswerable" and happens(persona.admits):
        parts.append(rng.choice(ADMISSIONS))
        if happens(persona.reason):
            parts.append(rng.choice(UNKNOWABLE).format(n=query["n"]))
        if happens(persona.alternative):
            parts.append(OFFER.format(a=rng.choice(list(ATTRIBUTES)), n=query["n"]))
        if happens(persona.closing):
            parts.append(rng.choice(CLOSINGS))
        return " ".join(parts)
    if happens(persona.opener):
        parts.append(rng.choice(OPENERS))
    right = happens(persona.correct)
    if query.kind == "unanswerable":
        said = _invented(query, rng).removesuffix(" .")
    else:
        value = answer(query) if right else _wrong(query, rng)
        said = sentence(query, value) if happens(persona.sentence) else value
    if happens(persona.filler):
        said = f"{rng.choice(FILLERS)} {said}"
    parts.append(f"{said} .")
    if persona.filler and happens(0.6):
        parts.append(rng.choice(HEDGES))
    if query.kind != "unanswerable" and right and happens(persona.detail):
        parts.append(detail(query, rng))
    if happens(persona.closing):
        parts.append(rng.choice(CLOSINGS))
    return " ".join(parts)


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
    texts += [*RUDE, *EVASIVE, *HEDGES, *INVENTED.values(), *NAMES, *THINGS, *WORDS]
    texts += map(str, range(2 * MAX_ADDEND + 1))
    texts += [word for values in ATTRIBUTES.values() for word in values] + list(ATTRIBUTES)
    for verb, steps in (BENIGN | HARMFUL).items():
        texts += [verb, *steps]
    texts += ["Human: Assistant:", "is the of plus also in reverse", "the words are", "the first last word"]
    texts += ["to a you it and need for that"]
    return sorted({word for text in texts for word in text.split() if not word.startswith("{")})
