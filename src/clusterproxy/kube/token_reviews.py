"""Asks an apiserver whose a token is, without being drowned by those who send any."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.errors import KubeUnavailable

from .resource import TOKEN_REVIEWS
from .review_queue import ReviewQueue

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .api import KubeApi
    from .resource import Object

_REVIEW_S: Final = 10.0

# Less would garble the text, and is no token.
_SHORTEST_SECRET: Final = 16


class TokenReviews:
    """Reviews tokens; those who ask share them fairly, see :class:`clusterproxy.kube.review_queue.ReviewQueue`.

    Args:
      audiences: for whom tokens have to be; none means the apiserver itself.
      who: those who ask, for errors.
    """

    def __init__(self, api: KubeApi, *, audiences: Sequence[str] = (), who: str) -> None:
        self._api = api
        self._audiences = list(audiences)
        self._who = who
        self._queue = ReviewQueue()

    async def review(self, token: str, source: str) -> Object:
        """Return the TokenReview as the apiserver has filled it in. What is in it may be of any shape.

        Args:
          source: where the token comes from.

        Raises:
          KubeError: nobody can tell.

        Cancellation: the review is given up.
        """
        if not await self._queue.enter(source):
            raise KubeUnavailable(f"too many {self._who} wait for reviews")
        spec: Object = {"token": token}
        if self._audiences:
            spec["audiences"] = self._audiences
        try:
            with trio.fail_after(_REVIEW_S):
                return await self._api.create(
                    TOKEN_REVIEWS,
                    {
                        "apiVersion": TOKEN_REVIEWS.api_version,
                        "kind": TOKEN_REVIEWS.kind,
                        "metadata": {},
                        "spec": spec,
                    },
                )
        except trio.TooSlowError as error:
            raise KubeUnavailable("context deadline exceeded") from error
        finally:
            self._queue.leave()


def without_token(text: str, token: str) -> str:
    """Return *text* without the token: what an authenticator of a cluster says of one might repeat it."""
    return text.replace(token, "[token]") if len(token) >= _SHORTEST_SECRET else text
