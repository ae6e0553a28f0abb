# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The process behind `benchmarks.engine.Worker`: one engine, commands as JSON lines on stdin.

The first line says which module's functions are the commands, how to build the engine and where to
answer; every further line is one command. Answers go to a pipe, because engines print.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback


def main() -> None:
    """Builds the engine, then answers commands until stdin is closed."""
    job = json.loads(sys.stdin.readline())
    with os.fdopen(job["reply_fd"], "w") as replies:

        def answer(message: dict) -> None:
            replies.write(json.dumps(message) + "\n")
            replies.flush()

        try:
            from vllm import LLM

            module = importlib.import_module(job["module"])
            llm = LLM(**job["engine_args"])
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"the engine did not start: {error}"})
            return
        answer({"result": "ready"})
        for line in sys.stdin:
            request = json.loads(line)
            try:
                result = getattr(module, request["command"])(llm, **request["arguments"])
            except Exception as error:
                traceback.print_exc()
                answer({"error": f"{request['command']}: {error}"})
            else:
                answer({"result": result})


if __name__ == "__main__":
    main()
