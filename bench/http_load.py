"""Clients for bench_serve, in a process of their own: `python -m bench.http_load` reads a task from stdin and writes
what the clients saw to stdout, both as JSON. As little Python as there can be: it shares the machine."""

import asyncio
import itertools
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Load:
    """What clients saw: seconds of the 200s, how often each status came, inputs answered, wall time."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter = field(default_factory=Counter)
    inputs: int = 0
    wall: float = 0.0


def main() -> None:
    task = json.load(sys.stdin)
    load = asyncio.run(drive(**task))
    json.dump(vars(load), sys.stdout)


async def drive(url: str, bodies: list[str], inputs: int, seconds: float, clients: int = 0, rate: float = 0) -> Load:
    host, port = url.removeprefix("http://").split(":")
    requests = [head(body) for body in bodies]
    load, turns = Load(), itertools.count()
    loop = asyncio.get_running_loop()

    async def one(connection, n: int, start: float) -> None:
        status = await connection.ask(requests[n % len(requests)])
        load.statuses[str(status)] += 1
        if status == 200:
            load.seconds.append(loop.time() - start)
            load.inputs += inputs

    async def client() -> None:
        connection = Connection(host, int(port))
        while loop.time() < end:
            await one(connection, next(turns), loop.time())
        connection.close()

    async def arrivals() -> None:
        free, running, n = [], set(), 0

        async def visit(n: int) -> None:
            connection = free.pop() if free else Connection(host, int(port))
            await one(connection, n, loop.time())
            free.append(connection)

        while loop.time() < end:
            while n < (loop.time() - begin) * rate:
                running.add(task := asyncio.ensure_future(visit(n)))
                task.add_done_callback(running.discard)
                n += 1
            await asyncio.sleep(0.002)
        await asyncio.gather(*running)
        for connection in free:
            connection.close()

    begin = loop.time()
    end = begin + seconds
    await (asyncio.gather(*(client() for _ in range(clients))) if clients else arrivals())
    load.wall = loop.time() - begin
    return load


class Connection:
    """HTTP/1.1, one request at a time, kept open; as little Python as there can be."""

    def __init__(self, host: str, port: int):
        self.host, self.port, self.writer = host, port, None

    async def ask(self, request: bytes) -> int | str:
        """The status; "lost" where the connection ends or nothing comes for a minute."""
        try:
            return await asyncio.wait_for(self._ask(request), 60)
        except (OSError, EOFError, asyncio.TimeoutError):
            self.close()
            return "lost"

    async def _ask(self, request: bytes) -> int:
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(self.host, self.port, limit=1 << 20)
        self.writer.write(request)
        answer = await self.reader.readuntil(b"\r\n\r\n")
        await self.reader.readexactly(int(re.search(rb"(?i)content-length: (\d+)", answer)[1]))
        if b"connection: close" in answer.lower():
            self.close()
        return int(answer[9:12])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def head(body: str) -> bytes:
    data = body.encode()
    return (b"POST /v1/embeddings HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(data)) + data  # fmt: skip


if __name__ == "__main__":
    main()
