"""Run in transformers' environment: `transformers_server.py MODEL PORT THREADS`.

`generate` with a static cache behind the least HTTP that streams completions: one request at a
time, a server-sent event a token.
"""

# mypy: ignore-errors
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer


class Events(BaseStreamer):
    """Writes each token as an event; the prompt, which `generate` hands over first, is skipped."""

    def __init__(self, tokenizer, stream) -> None:
        self._tokenizer, self._stream, self._prompt = tokenizer, stream, True

    def put(self, value) -> None:
        if self._prompt:
            self._prompt = False
            return
        text = self._tokenizer.decode(value.tolist())
        event = {"choices": [{"index": 0, "text": text}]}
        self._stream.write(f"data: {json.dumps(event)}\n\n".encode())
        self._stream.flush()

    def end(self) -> None:
        self._stream.write(b"data: [DONE]\n\n")


def main(path: str, port: int, threads: int) -> None:
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = tokenizer(body["prompt"], return_tensors="pt")
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            with torch.inference_mode():
                model.generate(
                    **prompt,
                    max_new_tokens=body["max_tokens"],
                    min_new_tokens=body["max_tokens"],
                    do_sample=False,
                    cache_implementation="static",
                    streamer=Events(tokenizer, self.wfile),
                )

        def log_message(self, *arguments) -> None:
            pass

    HTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
