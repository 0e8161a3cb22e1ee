"""Torch's side of C8, a process of its own: torch brings its own BLAS and loses time where ours is loaded too.

Nothing here imports hominem_mlx. Its arguments are the encoder's folder and a number of threads. Each line of standard
input is `{"tokens", "types", "said"}` of texts of one length; out comes `{"seconds", "features"}`, the last block's
mean over the reply.
"""

import json
import os
import sys
import time

import torch
from transformers import BertModel


def main() -> None:
    """Answers go to the real standard output; whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(int(sys.argv[2]))
    model = BertModel.from_pretrained(sys.argv[1], add_pooling_layer=False).eval()
    for line in sys.stdin:
        asked = json.loads(line)
        tokens, types = torch.tensor(asked["tokens"]), torch.tensor(asked["types"])
        began = time.perf_counter()
        with torch.inference_mode():
            hidden = model(tokens, token_type_ids=types).last_hidden_state
            features = torch.stack([row[first:last].mean(0) for row, (first, last) in zip(hidden, asked["said"])])
        seconds = time.perf_counter() - began
        answers.write(json.dumps({"seconds": seconds, "features": features.tolist()}) + "\n")


if __name__ == "__main__":
    main()
