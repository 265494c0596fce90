"""Whole runs of the embedded default, real Megatron-Core and real vLLM: layouts, algorithms, stops and resumes.

Why: each part is tested by itself; here is what only shows between them. Two facts tell most: the first update of a
step is exactly on policy (the old log-probs were computed as the update computes them), and trainer and engine agree on
the log-prob of each sampled token (weights arrived whole, the prefix cache is fresh, both mean the same distribution).

Not covered: learning (`make train` shows it; its figures are in docs/quick_start.md), several machines, CUDA.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

import numpy
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config.configure import load_config
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.errors import ConfigError
from megatron_fipo.processes import leftovers
from megatron_fipo.rewards.code.sandbox import find_sandbox
from megatron_fipo.tracking.credit_file import credit_path, read_credit
from megatron_fipo.tracking.problem_files import path_of_step, read_problems
from tests.algorithm.test_adding_a_loss import write_page
from tests.end_to_end import runs
from tests.end_to_end.runs import SMALL
from tests.engines.tokens import token_of
from tests.fake_hub import fake_hub

pytestmark = pytest.mark.slow

EVERY_CUT = ("parallel.tensor=2", "parallel.sequence=true", "parallel.virtual_pipeline=2", "parallel.packing=true")
"""Tensor, sequence, pipeline and virtual pipeline, on four ranks."""
LAYOUTS = {
    "every cut": EVERY_CUT,  # in every `make test` with a task that needs a sandbox
    "cp2-packed": ["parallel.context=2", "parallel.pipeline=1", "parallel.packing=true"],
    "dp2": ["parallel.data=2", "parallel.pipeline=1"],
    "tp2": ["parallel.tensor=2", "parallel.pipeline=1", "parallel.sequence=true"],
    "pp2": [],  # the other tests' layout
    "pp2-vpp2": ["parallel.virtual_pipeline=2"],
}
"""One by one what EVERY_CUT has together, or what test_layouts.py has without an engine."""


def check_rows(rows: list[dict[str, float]], steps: int) -> None:
    """What must hold of every step of a run in fp32."""
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row in rows:
        assert row["ppo_kl_first"] == 0.0
        assert 0 < row["log_prob_diff_mean"] < 1e-4, "trainer and engine disagree on the sampled tokens"
        assert row["weight_version"] == row["step"] - 1
        assert row["grad_norm"] > 0
        assert row["updates_skipped"] == 0
        ended = sum(row[f"tickets_{end}"] for end in ("trained", "rejected", "failed", "discarded", "in_flight"))
        assert row["tickets_opened"] == ended, "a prompt was lost, or counted twice"
    assert rows[-1]["tickets_trained"] == sum(row["groups_kept"] for row in rows)


def check_credit(directory: Path, row: dict[str, float]) -> None:
    """What must hold of the values per token of step 2, where every response is recorded."""
    _, responses = read_credit(credit_path(directory, 2))
    lines = (directory / "samples" / "step-000002.jsonl").read_text().splitlines()
    written = sorted((line["problem"], line["response"]) for line in map(json.loads, lines))
    assert sorted((found.facts["problem"], "".join(found.tokens)) for found in responses) == written
    weights = numpy.concatenate([found.credit.values["influence"] for found in responses])
    assert [weights.min(), weights.max()] == pytest.approx(
        [row["influence_weights_min"], row["influence_weights_max"]], rel=1e-6
    )
    moved = [bool(found.credit.values["log_ratio"].any()) for found in responses]
    assert moved == [found.facts["update"] > 0 for found in responses], "the policy has not moved in the first update"


def run_on(server: EnginePool, directory: Path, *overrides: str, environment: dict[str, str] | None = None) -> None:
    runs.run(directory, *SMALL, *runs.on(server), *overrides, token=token_of(server), environment=environment)


@pytest.mark.matrix
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, server: EnginePool, tmp_path: Path) -> None:
    check_layout(server, tmp_path, *LAYOUTS[layout])


def check_layout(server: EnginePool, directory: Path, *overrides: str) -> None:
    run_on(server, directory, "tracking.credit.responses=32", *overrides)
    rows = runs.rows(directory)
    check_rows(rows, steps=2)
    check_credit(directory, rows[1])
    assert rows[0]["influence_weights_std"] > 0, "the second update of a step is off policy, so weights differ"


def test_fipo_acts_and_dapo_is_one_override(server: EnginePool, tmp_path: Path) -> None:
    """At the quick start's own batches: influence weights spread and reach their bounds, and lead elsewhere than DAPO.

    The two start from the same samples. The second run's model comes from a hub: two ranks and their launcher fetch it
    once. It has no checkpoint, whose place is taken, goes to its end since it is told to, and its files tell of it.
    """
    fipo, dapo = tmp_path / "fipo", tmp_path / "dapo"
    tiny = load_config(["experiment=tiny"]).algorithm
    own = [f"algorithm.{name}={getattr(tiny, name)}" for name in ("prompts_per_step", "samples_per_prompt")]
    own += [f"algorithm.mini_batch_prompts={tiny.mini_batch_prompts}"]
    own += ["optimizer.schedule=constant"]  # a run of 24 steps has hardly left the first rate after two
    run_on(server, fipo, *own)
    dapo.mkdir()
    (dapo / "checkpoints").write_text("in the way")
    overrides = [*own, "algorithm=dapo", "checkpoint.every=1", "checkpoint.on_error=warn", "model.path=owner/small"]
    overrides += ["validation.every=2", "validation.samples=1"]
    with fake_hub() as hub:
        hub.repositories["owner/small"] = resolve_embedded("embedded:tiny")
        run_on(server, dapo, *overrides, environment=hub.environment(tmp_path / "home"))
        assert hub.downloads("owner/small").count("model.safetensors") == 1
    acting, plain = runs.rows(fipo), runs.rows(dapo)
    check_rows(acting, steps=2)
    check_rows(plain, steps=2)
    assert fmean(row["influence_weights_std"] for row in acting) >= 0.05
    assert fmean(row["influence_clipfrac_low"] + row["influence_clipfrac_high"] for row in acting) >= 0.01
    assert "influence_weights_mean" not in plain[0]
    assert plain[0]["reward_mean"] == acting[0]["reward_mean"], "the control: the same samples of the same weights"
    assert plain[1]["entropy"] != pytest.approx(acting[1]["entropy"], rel=1e-4)
    for step in (1, 2):
        assert f"warning: step {step} is not saved (0.01 GiB): " in runs.output(dapo)
    check_files(dapo)


def test_every_cut_at_once_learns_from_programs_that_a_sandbox_ran(server: EnginePool, tmp_path: Path) -> None:
    """Each reward of `experiment=tiny_code` is that of a program that ran, and agrees with what Python makes of it."""
    code = load_config(["experiment=tiny_code"]).reward.code
    try:
        find_sandbox(code)
    except ConfigError as error:
        pytest.skip(f"no sandbox on this machine: {error.problem}")
    check_layout(server, tmp_path, "experiment=tiny_code", *EVERY_CUT)
    rows = runs.rows(tmp_path)
    assert all(row["verifier_crashes"] == row["verifier_timeouts"] == 0 for row in rows)
    lines = [line for path in (tmp_path / "samples").glob("step-*.jsonl") for line in path.read_text().splitlines()]
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 2 * 8 * 4
    for sample in samples:
        terms = [int(term) for term in re.findall(r"\d+", sample["prompt"])]
        programs = re.findall(r"Answer: ([0-9+ ]+)", sample["response"])
        right = bool(programs) and is_sum(programs[-1], sum(terms) % 10)
        assert (sample["accuracy"], sample["reward"]) == (right, 1.0 if right else -1.0), sample
    assert {sample["accuracy"] for sample in samples} == {0.0, 1.0}, "the control: some were right and some were not"


def is_sum(program: str, digit: int) -> bool:
    """Whether a program of additions is one, and has this last digit."""
    try:
        return bool(eval(program, {}) % 10 == digit)
    except SyntaxError:
        return False


def check_files(directory: Path) -> None:
    """What a finished run of two steps without a checkpoint has written about itself."""
    report = runs.report(directory)
    assert report["state"]["kind"] == "finished"
    assert report["training"]["step"] == [1, 2] and report["held_out"]["step"] == [0, 2]
    assert all(seconds > 0 for seconds in report["held_out"]["seconds_validate"])
    assert {"start", "validate", "sample", "log-probs", "update", "weights"} <= {span[0] for span in report["spans"]}
    assert report["samples"]["validation"] == ["validation-000000.txt", "validation-000002.txt"]
    assert len((directory / "samples" / "validation-000002.jsonl").read_text().splitlines()) == 32
    for row in runs.rows(directory, "validation.jsonl"):
        problems = read_problems(path_of_step(directory, row["step"]))
        assert sum(problem.accuracy for problem in problems) / len(problems) == pytest.approx(row["accuracy"])
    summary = json.loads((directory / "summary.json").read_text())
    assert (summary["name"], summary["algorithm"], summary["future_kl"]) == ("tiny", "dapo", None)


@pytest.mark.matrix  # tests/policy has the divergence, tests/algorithm the loss of a file
def test_kl_to_the_reference_policy(server: EnginePool, tmp_path: Path) -> None:
    """It grows from the policy that training started from, and a resumed run still has that one and not its own.

    With the loss of docs/adding_a_loss.md, a file in another directory, on two ranks and over a resume.
    """
    write_page(tmp_path / "page")
    kl = [f"algorithm.loss={tmp_path / 'page' / 'my_losses.py'}:spo", "+algorithm.loss_options.epsilon=0.1"]
    kl += ["algorithm=grpo", "algorithm.reference_kl_coef=0.1", "optimizer.lr=1e-4", "checkpoint.every=2"]
    kl += ["parallel.tensor=2", "parallel.pipeline=1", "checkpoint.huggingface_every=2"]
    run_on(server, tmp_path, *kl)
    assert_same_as_converted(tmp_path, step=2)
    shutil.rmtree(tmp_path / "huggingface")
    (tmp_path / "huggingface").write_text("in the way")
    run_on(server, tmp_path, *kl, "run.steps=3")
    output = runs.output(tmp_path)
    assert f"step 3: no Hugging Face directory: {tmp_path / 'huggingface/step-000003'} could not be written" in output
    assert (tmp_path / "checkpoints/step-000003").is_dir() and "Traceback" not in output
    rows = runs.rows(tmp_path)
    check_rows(rows, steps=3)
    divergences = [row["reference_kl"] for row in rows]
    assert 0 < divergences[0] < divergences[1], "the mean of a step's two updates, of which only the first has none"
    assert divergences[2] > divergences[1] / 4
    assert (
        all(0 <= row["spo_outside"] < 1 for row in rows)
        and rows[1]["spo_outside"] > 0
        and (tmp_path / "code" / "my_losses.py").is_file()
    )


def assert_same_as_converted(directory: Path, step: int) -> None:
    """What a run has written for Hugging Face is what the tool makes of the checkpoint, and transformers loads it."""
    name = f"step-{step:06d}"
    written, converted = directory / "huggingface" / name, directory / "converted"
    tool = [sys.executable, "tools/convert_hf.py", "to-hf", directory / "checkpoints" / name, converted]
    subprocess.run(tool, cwd=runs.ROOT, env=os.environ | {"PYTHONPATH": str(runs.ROOT)}, check=True, timeout=120)
    names = {path.name for path in converted.iterdir()}
    assert names == {path.name for path in written.iterdir()} and {"config.json", "tokenizer_config.json"} <= names
    for name in names:
        assert (written / name).read_bytes() == (converted / name).read_bytes(), name
    network, info = AutoModelForCausalLM.from_pretrained(written, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    start = load_file(resolve_embedded("embedded:tiny") / "model.safetensors")
    found = {name: tensor for name, tensor in network.state_dict().items() if name in start}
    assert found.keys() == start.keys()
    changed = [name for name, tensor in found.items() if not torch.equal(tensor, start[name])]
    assert len(changed) > len(start) / 2, "the control: a run changes its weights"


@pytest.mark.matrix  # at k = 1 test_overlap.py shows it
def test_two_servers_of_which_one_is_killed_and_then_both(tmp_path: Path) -> None:
    """Both are started by the run, and get every weight update in several buckets.

    The other one goes on alone; when there is none, the run waits for both. No step is missing, and none is trained on
    other weights' samples.
    """
    settings = [*SMALL, "rollout.weight_transfer=process_group", "rollout.bucket_mib=1", "run.steps=6"]
    settings += ["algorithm.prompts_per_step=16", "rollout.max_num_seqs=8"]
    with runs.started(tmp_path, *settings, "rollout.servers=2") as process:
        runs.wait_until(lambda: runs.rows(tmp_path), "the first step", timeout_s=200)
        runs.kill_servers_of(tmp_path, "rollout-1.log")
        runs.wait_until(lambda: restarts(tmp_path) == 1, "the restart of one", timeout_s=200)
        runs.kill_servers_of(tmp_path)
        output = runs.finish(process, tmp_path)
    rows = runs.rows(tmp_path)
    check_rows(rows, steps=6)
    assert rows[0]["rollout_restarts"] == 0, "the control: it was killed after the first step"
    assert restarts(tmp_path) == 3 and rows[-1]["rollout_servers"] == 2, output
    assert "warning: restart 1 of at most 3: the vLLM server at http://127.0.0.1" in output
    assert output.count("is back in service") == 3
    runs.wait_until(lambda: not runs.processes_of(tmp_path), "the end of all processes", timeout_s=30)


def restarts(directory: Path) -> float:
    """Servers that the steps so far have started again."""
    return sum(row["rollout_restarts"] for row in runs.rows(directory))


def test_killed_and_resumed(server: EnginePool, tmp_path: Path) -> None:
    """A run killed after step 3 goes on from its checkpoint of step 2, and ends where an uninterrupted one ends.

    All its processes are killed at once, those too that would remove what they or others have put outside the run's
    directory; the next run does. With dynamic sampling, whose batches leave some groups over: the checkpoint carries
    them on.
    """
    settings = [*SMALL, "run.steps=4", "checkpoint.every=2", "optimizer.lr=1e-4", "checkpoint.huggingface_every=2"]
    settings += ["algorithm.filter_groups.enable=true", "algorithm.generation_batch_prompts=10"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_on(server, whole, *settings, "checkpoint.keep=1")
    assert [path.name for path in (whole / "huggingface").iterdir()] == ["step-000004"], "it goes with its checkpoint"
    assert_same_as_converted(whole, step=4)

    with runs.started(broken, *settings) as process:
        runs.wait_until(lambda: len(runs.rows(broken)) == 3, "step 3", timeout_s=200)
        left = runs.kill_all(process, broken)
    runs.wait_until(lambda: not runs.processes_of(broken), "the end of the killed run's processes", timeout_s=30)
    shutil.rmtree(broken / "checkpoints" / "step-000004", ignore_errors=True)
    assert [path for path in left if "/megatron_fipo-" not in str(path).replace("sem.", "")] == []
    assert any(path.exists() for path in left), "the control: something was left"
    (broken / "checkpoints" / ".step-000009.partial").mkdir()
    ledger = json.loads((broken / "checkpoints/step-000002/rollout/ledger.json").read_text())
    assert ledger["tickets"], "the control: groups are carried over"
    output = runs.run(broken, *settings)
    assert "removed what a killed run in" in output and f" in {broken / 'checkpoints'}" in output
    assert {path.name for path in (broken / "checkpoints").iterdir()} == {"step-000002", "step-000004"}

    assert "resumed from" in output
    assert not [path for path in left if path.exists()]
    assert not list(broken.rglob("*.partial"))
    check_rows(runs.rows(broken), steps=4)
    assert runs.report(broken)["training"]["step"] == [1, 2, 3, 4], "the report has the steps before the resume"
    for step in (3, 4):
        assert runs.prompts(broken, step) == runs.prompts(whole, step), "prompts skipped or repeated"
    for expected, found in zip(runs.rows(whole)[2:], runs.rows(broken)[2:], strict=True):
        # A fresh optimizer would take other steps: the momentum of two steps would be missing.
        for name in ("grad_norm", "entropy", "reward_mean", "influence_weights_std"):
            assert found[name] == pytest.approx(expected[name], rel=2e-2), (expected["step"], name)


@pytest.mark.matrix  # test_overlap.py stops a run, test_sweep.py interrupts one
def test_interrupted_run_is_saved_leaves_nothing_and_goes_on_honestly(tmp_path: Path) -> None:
    """While a step is sampled, whose time is most of it: it is dropped, and the state is that of the step before."""
    settings = [*SMALL, "run.steps=1000", "algorithm.prompts_per_step=32", "algorithm.mini_batch_prompts=16"]
    settings += ["algorithm.samples_per_prompt=8"]
    with runs.started(tmp_path, *settings) as process:
        runs.wait_until(lambda: runs.rows(tmp_path), "the first step", timeout_s=200)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 128 + signal.SIGINT
    runs.wait_until(lambda: not runs.processes_of(tmp_path), "the end of all processes", timeout_s=10)
    output = runs.output(tmp_path)
    assert "Traceback" not in output and f"run directory: {tmp_path}\n" in output
    assert "Ctrl-C: step 2, half sampled, is dropped" in output
    assert "this command resumes the run:\n" in output and output.endswith(f"run.directory={tmp_path}\n")
    assert runs.report(tmp_path)["state"]["kind"] == "stopped"
    beginning = leftovers.prefix(tmp_path).removesuffix(f"{os.getpid()}-")
    places = (leftovers.SHARED_MEMORY, Path(tempfile.gettempdir()))
    assert [path for place in places for path in place.glob(f"*{beginning}*")] == []
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    log = (tmp_path / "logs/rank-1.log").read_text()

    other = [*settings, "run.steps=2", "algorithm=dapo", "optimizer.lr=1e-5"]
    output = runs.finish(runs.start(tmp_path, *other), tmp_path, exit_code=2).removeprefix(output)
    assert output.count("\n") == 1 and "optimizer.lr: 0.0001 → 1e-05" in output
    assert "algorithm.loss_mode: future_kl → vanilla" in output and "run.resume_changed=true" in output
    assert (tmp_path / "logs/rank-1.log").read_text() == log, "no rank was started"
    assert not (tmp_path / "config-000001.yaml").exists()
    runs.run(tmp_path, *other, "run.resume_changed=true")
    check_rows(runs.rows(tmp_path), steps=2)
    first, then = (yaml.safe_load((tmp_path / name).read_text()) for name in ("config.yaml", "config-000001.yaml"))
    assert (first["algorithm"]["name"], then["algorithm"]["name"]) == ("fipo_7b", "dapo")
    assert "influence_weights_mean" in runs.rows(tmp_path)[0] and "influence_weights_mean" not in runs.rows(tmp_path)[1]


@pytest.mark.matrix
def test_a_killed_server_starts_again_and_the_run_goes_on(tmp_path: Path) -> None:
    """The run's only one, over the default plane, in the middle of a step's sampling."""
    settings = [*SMALL, "run.steps=3", "algorithm.prompts_per_step=16", "rollout.max_num_seqs=8"]
    with runs.started(tmp_path, *settings) as process:
        runs.wait_until(lambda: runs.rows(tmp_path), "the first step", timeout_s=200)
        runs.kill_servers_of(tmp_path)
        output = runs.finish(process, tmp_path)
    rows = runs.rows(tmp_path)
    check_rows(rows, steps=3)
    assert sum(row["rollout_restarts"] for row in rows) == 1
    assert rows[0]["rollout_restarts"] == 0, "the control: it was killed after the first step"
    assert [row["rollout_servers"] for row in rows] == [1, 1, 1]
    assert "warning: restart 1 of at most 3: the vLLM server at http://127.0.0.1" in output
    assert "is back in service" in output
    runs.wait_until(lambda: not runs.processes_of(tmp_path), "the end of all processes", timeout_s=30)


@pytest.mark.matrix  # test_link.py has its end
def test_a_killed_rollout_process_ends_the_run(tmp_path: Path) -> None:
    """In bounded time, with one line for all ranks; its servers and verifiers go with it."""
    with runs.started(tmp_path, *SMALL, "run.steps=1000", "parallel.data=2") as process:
        runs.wait_until(lambda: runs.rows(tmp_path), "the first step", timeout_s=200)
        (rollouts,) = (p for p in runs.processes_of(tmp_path) if "megatron_fipo.rollout_process.process" in p.cmdline())
        assert len(rollouts.children(recursive=True)) > 1, "a server and verifiers"
        rollouts.kill()
        assert process.wait(timeout=60) == 1
    assert runs.output(tmp_path).count("the rollout process was ended by signal 9") == 1
    runs.wait_until(lambda: not runs.processes_of(tmp_path), "the end of all processes", timeout_s=30)


@pytest.mark.matrix
def test_without_restarts_a_dead_server_ends_the_run(tmp_path: Path) -> None:
    """The run stops within a bounded time, names the server and shows its log; no process stays."""
    with runs.started(tmp_path, *SMALL, "run.steps=1000", "rollout.max_restarts=0") as process:
        runs.wait_until(lambda: runs.rows(tmp_path), "the first step", timeout_s=200)
        runs.kill_servers_of(tmp_path)
        assert process.wait(timeout=90) != 0
    assert "the vLLM server at http://127.0.0.1" in runs.output(tmp_path)
    runs.wait_until(lambda: not runs.processes_of(tmp_path), "the end of all processes", timeout_s=30)


def test_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    """In one line, before any rank is started."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    before = sorted(tmp_path.iterdir())
    output = runs.finish(runs.start(tmp_path, *SMALL, "run.resume=never"), tmp_path, exit_code=2)
    assert output.startswith(f"error: run.resume: never, but {tmp_path} holds a run") and output.count("\n") == 1
    assert runs.rows(tmp_path) == [{"step": 1}]
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "output.txt"])
