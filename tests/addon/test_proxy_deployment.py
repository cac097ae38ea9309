from __future__ import annotations

from typing import Any

import pytest

from clusterproxy.addon.proxy_deployment import replicas_for_now


def present(count: int, told: int, **status: int) -> dict[str, Any]:
    """A Deployment whose servers tell agents that they are *told*."""
    container = {"args": ["--proxy-strategies=destHost", f"--server-count={told}"]}
    settled = {
        "observedGeneration": 7,
        "replicas": count,
        "updatedReplicas": count,
        "readyReplicas": count,
    }
    return {
        "metadata": {"generation": 7},
        "spec": {"replicas": count, "template": {"spec": {"containers": [container]}}},
        "status": settled | status,
    }


@pytest.mark.parametrize(
    ("deployment", "wanted", "for_now"),
    [
        # Those that are there are replaced by some that tell of three, and then there are more.
        (present(1, 1), 3, 1),
        (present(1, 3, observedGeneration=6), 3, 1),
        (present(1, 3, replicas=2), 3, 1),
        (present(2, 3, updatedReplicas=1), 3, 2),
        (present(1, 3), 3, 3),
        # Fewer, or as many: at once.
        (present(3, 3), 1, 1),
        (present(3, 1), 3, 3),
        # Nobody loses anything.
        (present(1, 1, readyReplicas=0), 3, 3),
        ({}, 3, 3),
        ({"spec": {"replicas": "x"}, "status": {"readyReplicas": 1}}, 3, 3),
    ],
)
def test_servers_are_replaced_before_there_are_more(
    deployment: dict[str, Any], wanted: int, for_now: int
) -> None:
    assert replicas_for_now(deployment, wanted) == for_now
