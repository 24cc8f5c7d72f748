"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class APIError(Exception):
    """An answer that is not 2xx.

    Attributes:
        status: of HTTP.
        message: for a human.
        param: the place in the request that is at fault, as "messages[0].content[1].image_url", or None.
        code: for a machine.
        headers: more headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class BodyTooLarge(APIError):
    """413, while the rest of the body may still be coming."""

    def __init__(self, limit: int):
        message = f"the body is larger than the {limit:,} bytes that this server takes"
        super().__init__(413, message, code="request_too_large")


def bad_request(message: str, param: str | None = None, code: str | None = "invalid_value") -> APIError:
    return APIError(400, message, param=param, code=code)


def busy(message: str, seconds: float) -> APIError:
    """429: come again in so many seconds."""
    retry = str(min(60, max(1, round(seconds))))
    return APIError(429, message, code="rate_limit_exceeded", headers={"retry-after": retry})
