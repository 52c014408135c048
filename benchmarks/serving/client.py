"""Load on a Triton server over gRPC on loopback; runs in the environment that has tritonclient.

    client.py replay ADDRESS MODEL INPUT SHAPE < arrivals     open loop: requests go out at their times, come what may
    client.py bursts ADDRESS MODEL INPUT SIZE COUNT SHAPE     closed loop: two bursts of requests always on their way

Prints JSON: for each request, or each burst, the seconds of sending and of responses, and whether it was refused. A
request is one row of fixed numbers, serialised beforehand; responses are not decoded.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

METHOD = "/inference.GRPCInferenceService/ModelInfer"


def request_bytes(model: str, name: str, shape: tuple[int, ...]) -> bytes:
    request = service_pb2.ModelInferRequest(model_name=model)
    tensor = request.inputs.add(name=name, datatype="FP32", shape=(1, *shape))
    del tensor
    request.raw_input_contents.append(np.linspace(0, 1, int(np.prod(shape)), dtype=np.float32).tobytes())
    return request.SerializeToString()


class Client:
    def __init__(self, address: str, content: bytes) -> None:
        self.channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        grpc.channel_ready_future(self.channel).result(timeout=60)
        self.call = self.channel.unary_unary(METHOD, request_serializer=None, response_deserializer=None)
        self.content = content

    def send(self, done: Any) -> None:
        self.call.future(self.content, timeout=120).add_done_callback(done)


def replay(client: Client, arrivals: list[float]) -> dict[str, list[Any]]:
    count = len(arrivals)
    sent, answered, refused = [0.0] * count, [0.0] * count, [False] * count
    left = threading.Semaphore(0)

    def done_of(index: int) -> Any:
        def done(future: Any) -> None:
            answered[index] = time.perf_counter()
            refused[index] = future.code() is not grpc.StatusCode.OK
            left.release()

        return done

    start = time.perf_counter() + 0.2
    for index, at in enumerate(arrivals):
        wait = start + at - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        sent[index] = time.perf_counter()
        client.send(done_of(index))
    for _ in range(count):
        left.acquire()
    return {
        "sent": [at - start for at in sent],
        "answered": [at - start for at in answered],
        "refused": refused,
    }


def bursts(client: Client, size: int, count: int) -> dict[str, list[Any]]:
    """So many times that many requests at once, two bursts always on their way."""
    answered: list[list[float]] = [[] for _ in range(count)]
    left = [threading.Semaphore(0) for _ in range(count)]

    def send(index: int) -> None:
        def done(future: Any) -> None:
            answered[index].append(time.perf_counter())
            left[index].release()

        for _ in range(size):
            client.send(done)

    for index in range(min(2, count)):
        send(index)
    for index in range(count):
        for _ in range(size):
            left[index].acquire()
        if index + 2 < count:
            send(index + 2)
    return {"answered": [sorted(times) for times in answered]}


def main() -> None:
    mode, address, model, name, *rest = sys.argv[1:]
    shape = tuple(int(size) for size in rest[-1].split("x"))
    client = Client(address, request_bytes(model, name, shape))
    if mode == "replay":
        for _ in range(20):
            client.call(client.content, timeout=60)
    gc.disable()
    json.dump(
        replay(client, json.load(sys.stdin)) if mode == "replay" else bursts(client, *map(int, rest[:2])), sys.stdout
    )


if __name__ == "__main__":
    main()
