"""lm-evaluation-harness on this machine alone: its own TruthfulQA over local questions, and small tasks of ours."""

import json
import logging
import os
from pathlib import Path
from typing import Any

# Read when its libraries are imported: nothing is asked of any hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

SMOLLM2 = Path(__file__).parents[2] / "models" / "smollm2-135m"


def shared_data(*parts: str) -> Path:
    """A file of the data that may lie beside the checkout, or where ALMOST_JAX_DATA says."""
    root = Path(__file__).parents[2]
    places = [root / "shared" / "data", root.parent / "shared" / "data", root.parents[1] / "shared" / "data"]
    given = os.environ.get("ALMOST_JAX_DATA")
    folder = Path(given) if given else next((place for place in places if place.is_dir()), places[0])
    return folder.joinpath(*parts)


def smollm2() -> Path | None:
    """The folder that `make smollm2` makes, or the one that ALMOST_JAX_SMOLLM2 names."""
    folder = Path(os.environ.get("ALMOST_JAX_SMOLLM2", SMOLLM2))
    return folder if (folder / "model.json").is_file() else None


def write_truthfulqa(folder: Path, questions: list[dict[str, Any]]) -> list[str]:
    """The harness's own two tasks over these questions; their names."""
    import lm_eval

    own = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa"
    rows = [
        {
            "question": one["question"],
            **{
                key: {"choices": list(one[key]), "labels": list(one[key].values())}
                for key in ("mc1_targets", "mc2_targets")
            },
        }
        for one in questions
    ]
    (folder / "questions.json").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    for kind in ("mc1", "mc2"):
        lines = [
            f"include: {own / f'truthfulqa_{kind}.yaml'}",
            f"task: local_{kind}",
            "tag: local",
            "dataset_path: json",
            "dataset_name: null",
            f"dataset_kwargs: {{data_files: {{validation: {folder / 'questions.json'}}}}}",
        ]
        (folder / f"local_{kind}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ["local_mc1", "local_mc2"]


def write_tasks(folder: Path, documents: list[dict[str, Any]]) -> list[str]:
    """One small task of each kind over documents {"question", "choices", "answer": place, "text"}; their names."""
    (folder / "documents.json").write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    head = [
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {{test: {folder / 'documents.json'}}}}}",
        "test_split: test",
    ]
    tasks = {
        "local_choices": [
            "output_type: multiple_choice",
            'doc_to_text: "{{question}}"',
            'doc_to_choice: "{{choices}}"',
            'doc_to_target: "{{answer}}"',
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]",
        ],
        "local_last_word": [
            "output_type: loglikelihood",
            "doc_to_text: \"{{text.split(' ')[:-1]|join(' ')}}\"",
            "doc_to_target: \"{{' ' + text.split(' ')[-1]}}\"",
            "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false},"
            " {metric: acc, aggregation: mean, higher_is_better: true}]",
        ],
        "local_rolling": [
            "output_type: loglikelihood_rolling",
            'doc_to_text: ""',
            'doc_to_target: "{{text}}"',
            "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]",
        ],
        "local_generate": [
            "output_type: generate_until",
            'doc_to_text: "{{question}}"',
            'doc_to_target: "{{choices[answer]}}"',
            "generation_kwargs: {until: ['\\n', '.'], max_gen_toks: 12, do_sample: false}",
            "metric_list: [{metric: exact_match}]",
        ],
    }
    for name, lines in tasks.items():
        (folder / f"{name}.yaml").write_text("\n".join([f"task: {name}", *head, *lines]) + "\n", encoding="utf-8")
    return list(tasks)


def run(model: str, arguments: dict[str, Any], folder: Path, tasks: list[str]) -> dict[str, Any]:
    """The harness's results and samples."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=tasks,
        batch_size=8,
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    assert found is not None
    return dict(found)


def responses(found: dict[str, Any], task: str) -> list[Any]:
    """What the model returned for each document of a task, in the order of the documents."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["resps"] for sample in samples]
