"""A step of a mixture of experts whose routers choose otherwise in its updates, though no weight has changed.

The engine's choices, where they are replayed, are any: the ratio of the first weights is 1 whatever it chose.

Why: with each jump of a router a ratio jumps, and F sums the jumps of all tokens after it; a choice that is lost on the
way from the old-log-prob pass to the update would look like learning. Gradients, and layouts: test_layouts.py.
"""

import pytest

from tests.distributed import run_ranks

pytestmark = pytest.mark.slow


def test_every_update_of_a_step_replays_the_old_log_probs_experts() -> None:
    ways = [
        ("trainer", False, True),
        ("trainer", True, True),
        ("trainer", False, False),
        ("none", False, True),
        ("none", False, False),
        ("rollout", False, False),
        ("rollout", True, True),
        ("two bytes", True, True),
        ("losses", False, False),
        ("losses", True, False),
        ("losses alone", False, False),
    ]
    (found,) = run_ranks("tests.policy.router_ranks:steps", 1, {"ways": ways})
    others, every, same, free, plain, *engines, late, early, alone = found
    for replayed in (others, every, same, *engines):
        assert replayed["updates"] == 3
        assert replayed["ppo_kl"] == replayed["ppo_kl_first"] == 0.0
        assert replayed["ratio_positive_q01"] == replayed["ratio_positive_q99"] == 1.0
    assert free["ppo_kl_first"] == 0.0 and abs(free["ppo_kl"]) > 1e-3, "the control: routers choose by themselves"
    assert plain["ppo_kl"] == 0.0, "the control's control: it is the routers' doing"
    assert others["router_changed"] == every["router_changed"] == 1.0 and same["router_changed"] == 0.0
    assert not any("router_changed" in found for found in (free, plain)), "nothing was replayed"
    # Recorded before the routers changed, so the load is that of the routers as they were.
    names = ("router_load", "router_load_max", "router_entropy", "router_entropy_min")
    assert [every[name] for name in names] == [same[name] for name in names] == [plain[name] for name in names]
    assert free["router_load"] != plain["router_load"]
    assert 0 < plain["router_entropy_min"] <= plain["router_entropy"] and plain["router_load"] >= 1
    # The engine's choices are drawn at random, and of some tokens they are not known.
    assert all(0.5 < found["router_mismatch"] < 1 for found in engines)
    assert all(found["reference_kl"] == 0.0 for found in engines), "the reference goes to the engine's experts too"
    assert engines[0]["router_mismatch"] == engines[1]["router_mismatch"], "each token once, in whichever pass"
    assert engines[0]["router_load"] == engines[1]["router_load"] != plain["router_load"]
    assert all(found["router_changed"] > 0.5 for found in engines)
    assert engines[2] == engines[1], "however many bytes an expert's number has"
    assert "router_mismatch" not in others, "nothing is known of the engine"
    assert late == early, "the load of experts needs a pass before the first update, whether its log-probs do or not"
    assert late["updates_skipped"] == 0 and alone["updates_skipped"] == 3, "nothing divides the routers' losses"
    assert 1 < late["router_aux_loss"] < late["router_load_max"] and "router_aux_loss" not in plain
    assert all(found["router_tokens_dropped"] == 0.0 for found in (others, every, same, free, plain, *engines))


def test_frozen_routers_keep_their_weights() -> None:
    """To the last bit, while all others become what they become without; and the norm is smaller by theirs.

    Experts and the optimizer's state are dealt to two ranks. The control is the other run, whose routers move.
    """
    parallel = {"data": 2, "expert": 2, "distributed_optimizer": True}
    for learning, frozen in run_ranks("tests.policy.router_ranks:weights_after_an_update", 2, {"parallel": parallel}):
        assert frozen["before"] == learning["before"] and frozen["after"].keys() == learning["after"].keys()
        routers = [name for name in frozen["after"] if name.endswith("mlp.router.weight")]
        assert routers and set(learning["trained"]) - set(frozen["trained"]) == set(routers)
        for name, digest in frozen["after"].items():
            assert digest == (frozen["before"] if name in routers else learning["after"])[name], name
            assert learning["after"][name] != learning["before"][name], name
        assert 0 < frozen["grad_norm"] < learning["grad_norm"]
