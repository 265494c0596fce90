"""The address that a rollout node gives its servers, with this machine's own names and interfaces.

Why: a name often leads to the loopback address, at which the trainer finds its own node. Not covered: the servers,
which tests/slurm starts.
"""

import socket

import pytest

from megatron_fipo.errors import RolloutError
from megatron_fipo.launch.rollout_node import own_address


def test_a_name_that_leads_to_loopback_is_refused_beside_other_nodes() -> None:
    assert own_address("localhost", None, nodes=1) == "127.0.0.1"
    with pytest.raises(RolloutError, match=r"localhost: .* 127\.0\.0\.1.*set FIPO_NETWORK_INTERFACE"):
        own_address("localhost", None, nodes=2)


def test_only_ipv4_is_taken() -> None:
    with pytest.raises(RolloutError, match=r"::1: its own name has no IPv4 address"):
        own_address("::1", None, nodes=1)


def test_the_interface_that_is_named_wins_over_the_name() -> None:
    """The first interface that exists here is used: nodes of one job may have different names for it."""
    assert own_address("no-such-node.invalid", "no-such0,lo", nodes=1) == "127.0.0.1"
    with pytest.raises(RolloutError, match="which the job's other nodes cannot reach"):
        own_address("no-such-node.invalid", "lo", nodes=2)
    assert socket.inet_aton(own_address("192.0.2.7", None, nodes=2)), "the control: another address is good"


def test_an_interface_that_is_not_here_is_named_with_those_that_are() -> None:
    with pytest.raises(RolloutError, match=r"n1: no interface no-such0 .* but .*\blo\b"):
        own_address("n1", "no-such0", nodes=2)
