"""What the commands do: train a run and its baselines, build its index, evaluate it, ask it."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as hf_logging

from jmlr import config as recipes
from jmlr.assemble import Parts, assemble
from jmlr.config import RunConfig
from jmlr.console import ProgressLine, duration, print_table
from jmlr.data.prompts import PromptBuilder
from jmlr.data.questions import Question, load_questions, resolve_support
from jmlr.errors import UserError
from jmlr.evaluate import Comparison, SystemResult, comparison, summary_table
from jmlr.evaluate.systems import SYSTEMS, option_log_likelihoods, rank_passages
from jmlr.phase import FINISHED, PHASES, evaluate_phase, finished, load_phase, load_results, phase_config, train_phase
from jmlr.report import write_report
from jmlr.retriever.encoder import load_retriever
from jmlr.runs import CONFIG_FILE, run_config
from jmlr.trainer import last_checkpoint

hf_logging.set_verbosity_error()  # loading reports list the fresh linear map of every plain BERT
hf_logging.disable_progress_bar()  # the run has a progress line of its own


def train(config: RunConfig, run_dir: Path, resume: bool = False, max_steps: int | None = None) -> None:
    """Trains the joint model and the baselines that the recipe's systems need, evaluates all, writes the report.

    Raises:
        UserError: bad input; raised before any training starts.
    """
    started = time.monotonic()
    parts = assemble(config)  # every check of data, tokenizers and lengths
    run_dir.mkdir(parents=True, exist_ok=True)
    recipes.save(config, run_dir / CONFIG_FILE)
    texts = parts.texts
    print(
        f"{config.name}: {len(texts.passages):,} passages; questions in several wordings: {len(texts.train):,} to train"
        f" on, {len(texts.probe):,} to watch, {len(texts.test):,} to test on, of conditions never trained on",
        flush=True,
    )
    phases = [phase for phase in PHASES if any(SYSTEMS[name].trained == phase for name in config.evaluate.systems)]
    beside = [phase for phase in phases if phase != "joint"] if _side_by_side(config) and max_steps is None else []
    helper = _start_beside(run_dir, beside) if beside else None
    _set_threads(config, shared=helper is not None)
    try:
        for phase in phases:
            if phase not in beside:
                _train_and_evaluate(parts, phase, run_dir, resume=resume, max_steps=max_steps, helper=helper)
        if helper is not None:
            _wait(helper, run_dir)
    finally:
        if helper is not None and helper.poll() is None:
            helper.terminate()
            helper.wait()
    if max_steps is not None and not all(finished(run_dir / phase) for phase in phases):
        print(f"stopped after {max_steps} steps; `jmlr train --resume` goes on from there")
        return
    _finish(parts, run_dir, time.monotonic() - started)


def _train_and_evaluate(
    parts: Parts,
    phase: str,
    run_dir: Path,
    *,
    resume: bool,
    max_steps: int | None = None,
    helper: subprocess.Popen[bytes] | None = None,
) -> None:
    steps = phase_config(parts.config, phase).train.steps
    checkpoint = last_checkpoint(run_dir / phase) if resume else None
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint is not None else 0
    if not finished(run_dir / phase):
        with ProgressLine(steps, phase, initial=done) as line:

            def report(row: dict[str, Any]) -> None:
                if helper is not None and helper.poll():  # the baselines failed: say so now, not minutes later
                    _wait(helper, run_dir)
                line.update(
                    int(row["step"]),
                    llm_loss=row.get("loss_lm"),
                    rank_loss=row.get("loss_rank"),
                    recall_at_1=row.get("recall@1"),
                    recall_at_7=row.get("recall@7"),
                )

            train_phase(parts, phase, run_dir, resume=resume, max_steps=max_steps, report=report)
    if finished(run_dir / phase) and load_results(run_dir, phase) is None:
        evaluate_phase(parts, phase, run_dir, parts.config.evaluate.systems)


# ---------------------------------------------------------------- baselines beside the joint run


def _side_by_side(config: RunConfig) -> bool:
    """On a CPU with cores to share, the baselines train on half of them while the joint model has the other half."""
    return config.train.parallel_baselines and not torch.cuda.is_available() and _cores() > 1


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _set_threads(config: RunConfig, *, shared: bool) -> None:
    torch.set_num_threads(config.threads or max(1, _cores() // 2 if shared else _cores()))


def _start_beside(run_dir: Path, phases: Sequence[str]) -> subprocess.Popen[bytes]:
    log = (run_dir / "baselines.log").open("ab")
    with log:
        return subprocess.Popen(
            [sys.executable, "-m", "jmlr.run", str(os.getpid()), str(run_dir), *phases],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _die_with_parent(parent: int) -> None:
    """Linux: a baseline process must not outlive a killed run, else --resume would find two writers."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:  # it died before it could be asked
            os._exit(1)


def _wait(helper: subprocess.Popen[bytes], run_dir: Path) -> None:
    if helper.poll() is None:
        print("joint model done; waiting for the baselines beside it", flush=True)
    if helper.wait() != 0:
        tail = (run_dir / "baselines.log").read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
        raise UserError(
            f"the baselines failed (exit {helper.returncode}): {' '.join(tail)}",
            file=run_dir / "baselines.log",
            remedy="mend it and continue with --resume",
        )


def _beside(parent: int, run_dir: Path, phases: Sequence[str]) -> None:
    _die_with_parent(parent)
    config = run_config(run_dir)
    parts = assemble(config)
    _set_threads(config, shared=True)
    for phase in phases:
        _train_and_evaluate(parts, phase, run_dir, resume=True)


# ---------------------------------------------------------------- table and report


def _finish(parts: Parts, run_dir: Path, seconds: float) -> None:
    config = parts.config
    results = _results(parts, run_dir, config.evaluate.systems)
    records = {
        phase: json.loads((run_dir / phase / FINISHED).read_text(encoding="utf-8"))
        for phase in PHASES
        if finished(run_dir / phase)
    }
    history = []
    for phase, record in records.items():
        if record["prompts_shortened"]:
            print(
                f"{phase}: {record['prompts_shortened']:,} of {record['prompts']:,} prompts were too long for the model"
                " and lost whole passages, the worst first"
            )
        version = 0.0
        for row in record["history"]:
            refreshed = row.get("index_version", version)
            history.append({**row, "phase": phase, "refresh": refreshed != version})
            version = refreshed
    rows = summary_table(results, confidence=config.evaluate.confidence, resamples=config.evaluate.bootstrap)
    print()
    print_table(rows, config.evaluate.confidence)
    by_name = {result.name: result for result in results}
    if {"joint", "rag"} <= by_name.keys():
        print("\n".join(_compare(parts, by_name).sentences()))
    times = {phase: record["seconds"] for phase, record in records.items()}
    path = write_report(
        run_dir,
        config=asdict(config),
        results=results,
        history=history,
        seconds={**times, "in all": seconds},
        environment=environment(),
        examples=_examples(parts, run_dir) if "joint" in records else [],
        confidence=config.evaluate.confidence,
        resamples=config.evaluate.bootstrap,
    )
    allowed = config.budget_minutes
    over = f", over the recipe's {allowed:g} minutes" if allowed and seconds > 60 * allowed else ""
    print(f"{duration(seconds)} in all{over}; report: {path}", flush=True)


def _compare(parts: Parts, by_name: dict[str, SystemResult]) -> Comparison:
    settings = parts.config.evaluate
    return comparison(by_name["joint"], by_name["rag"], confidence=settings.confidence, resamples=settings.bootstrap)


def _results(parts: Parts, run_dir: Path, systems: Sequence[str]) -> list[SystemResult]:
    found = {r.name: r for phase in PHASES for r in load_results(run_dir, phase) or []}
    return [found[name] for name in systems if name in found]


def environment() -> dict[str, Any]:
    """What is needed to run the same again."""
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _examples(parts: Parts, run_dir: Path, count: int = 4, shown: int = 3) -> list[dict[str, Any]]:
    """A few test questions with what the retriever found before training and after."""
    questions = parts.texts.test[:: max(1, len(parts.texts.test) // count)][:count]
    trained = load_phase(parts, "joint", run_dir)
    start = parts.retriever().eval()
    sides = {"before": (start, parts.build_index(start, 0)), "after": (trained.retriever, trained.index)}
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for side, (retriever, index) in sides.items():
        assert retriever is not None and index is not None
        k = max(shown, parts.config.joint.context)
        found[side] = rank_passages(retriever, parts.retriever_tokenizer, index, [q.question for q in questions], k, 64)
    examples = []
    for row, question in enumerate(questions):
        example: dict[str, Any] = {"id": question.id, "question": question.question, "answer": question.gold}
        example["options"] = list(question.options)
        for side, (scores, numbers) in found.items():
            passages = [parts.texts.passages[n] for n in numbers[row, :shown].tolist()]
            context = numbers[row, : parts.config.joint.context].tolist()
            likelihood = option_log_likelihoods(trained.llm, parts.prompts, [question], [context], 16)[0]
            example[side] = {
                "label": f"retriever {side} training",
                "prediction": question.options[int(likelihood.argmax())],
                "passages": [
                    {
                        "id": p.id,
                        "title": p.title,
                        "text": p.text,
                        "url": p.url,
                        "score": float(score),
                        "supporting": p.id in question.supporting,
                    }
                    for p, score in zip(passages, scores[row], strict=False)
                ],
            }
        examples.append(example)
    return examples


# ---------------------------------------------------------------- the other commands


def _open(run_dir: Path) -> Parts:
    return assemble(run_config(run_dir))


def index(run_dir: Path) -> None:
    """Encodes the corpus again with the run's trained retriever and replaces its index."""
    parts = _open(run_dir)
    final = run_dir / "joint" / "final"
    retriever, _ = load_retriever(final / "retriever", parts.config.retriever)
    built = parts.build_index(retriever, 0)
    built.save(final / "index")
    manifest = built.manifest
    print(f"{final / 'index'}: {manifest.passages:,} passages, {manifest.tokens:,} token vectors of {manifest.dim}")


def evaluate(run_dir: Path, questions: Sequence[str] | None = None, systems: Sequence[str] | None = None) -> None:
    """Evaluates a finished run again, on its own test questions or on others, and prints the table.

    Other questions are asked as they are worded, and leave the run's own results as they are.
    """
    parts = _open(run_dir)
    if questions:
        data = parts.config.data
        found = load_questions(
            list(questions),
            data_dir=data.data_dir,
            repeated_ids=data.repeated_ids,
            repeated_options=data.repeated_options,
        )
        parts.texts = replace(parts.texts, test=resolve_support(found, parts.texts.passages))
        parts.prompts.check(parts.texts.test)
    names = list(systems or parts.config.evaluate.systems)
    by_name = {r.name: r for phase in PHASES for r in evaluate_phase(parts, phase, run_dir, names, keep=not questions)}
    results = [by_name[name] for name in names]
    settings = parts.config.evaluate
    print_table(
        summary_table(results, confidence=settings.confidence, resamples=settings.bootstrap), settings.confidence
    )
    if {"joint", "rag"} <= by_name.keys():
        print("\n".join(_compare(parts, by_name).sentences()))


def ask(run_dir: Path, question: str, options: Sequence[str] = (), top: int | None = None) -> None:
    """Answers one question from a finished run, with the passages used and their MaxSim scores.

    With options the likeliest is chosen; without, the answer is generated greedily.
    """
    parts = _open(run_dir)
    trained = load_phase(parts, "joint", run_dir)
    assert trained.retriever is not None and trained.index is not None
    k = top or parts.config.joint.context
    scores, numbers = rank_passages(trained.retriever, parts.retriever_tokenizer, trained.index, [question], k, 1)
    context = numbers[0, : parts.config.joint.context].tolist()
    choices = tuple(options)
    asked = Question(id="asked", question=question, options=choices or ("",), answer=0)
    if choices:
        likelihood = option_log_likelihoods(trained.llm, parts.prompts, [asked], [context], 16)[0]
        share = likelihood.softmax(-1)
        for option, part in sorted(zip(choices, share.tolist(), strict=True), key=lambda pair: -pair[1]):
            print(f"{part:6.1%}  {option}")
    else:
        print(_generate(trained.llm, parts.prompts, asked, context))
    print()
    for score, number in zip(scores[0].tolist(), numbers[0].tolist(), strict=True):
        passage = parts.texts.passages[number]
        print(f"{score:8.3f}  [{passage.id}] {passage.text[:300]}{'...' if len(passage.text) > 300 else ''}")


@torch.no_grad()
def _generate(llm: Any, prompts: PromptBuilder, question: Question, context: list[int]) -> str:
    built = prompts.build(question, context, "")
    ids = torch.tensor([built.ids[: -len(prompts.end)]], device=next(llm.parameters()).device)
    room = min(32, prompts.max_length - ids.shape[1])
    out = llm.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=room,
        do_sample=False,
        eos_token_id=prompts.end[0],
        pad_token_id=prompts.end[0],
    )
    return prompts.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    try:
        _beside(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
