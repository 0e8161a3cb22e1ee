"""Pick the best of several replies, in a tool of your own.

    python docs/examples/judge_replies.py candidates.jsonl [--home FOLDER]

Each line of the file is `{"prompt": "...", "responses": ["...", "..."]}`. Printed is one line of JSON for each: the
reply the reward model in use likes best, what it is worth, and by how much it leads. A lead smaller than the doubt
about it is no lead: `sure` says so.
"""

import argparse
import json
from pathlib import Path

from hominem_mlx import Registry, RewardModel
from hominem_mlx.config import home_folder


def choose(judge, prompt: str, responses: list[str]) -> dict:
    """The best reply by overall reward.

    Args:
        judge: anything with `score_many`: a reward model, or a double in a test.
        prompt, responses: what was said, and two or more replies to it.
    """
    outputs = judge.score_many([(prompt, response) for response in responses])
    ranked = sorted(zip(outputs, responses), key=lambda pair: pair[0].scalar, reverse=True)
    (best, reply), (second, _) = ranked[:2]
    lead = best.scalar - second.scalar
    doubt = best.uncertainty.get("scalar", 0.0) + second.uncertainty.get("scalar", 0.0)
    strongest = max(best.reward_vector, key=lambda name: best.reward_vector[name])
    return {
        "prompt": prompt,
        "best": reply,
        "reward": round(best.scalar, 3),
        "lead": round(lead, 3),
        "sure": lead > doubt,
        "safe": best.safety_score > 0,
        "strongest_in": strongest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--home", help="else $HOMINEM_HOME, else ~/.hominem")
    arguments = parser.parse_args()
    judge = RewardModel.load(Registry(home_folder(arguments.home)).get("reward_model", "current").folder)
    for line in arguments.file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        print(json.dumps(choose(judge, row["prompt"], row["responses"]), ensure_ascii=False))


if __name__ == "__main__":
    main()
