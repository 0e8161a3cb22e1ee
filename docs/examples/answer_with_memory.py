"""Let the model that learnt from you answer, in a tool of your own.

    python docs/examples/answer_with_memory.py "What is my sister called?" [--home FOLDER]

Loads the base model of the home and the adapter in use for it, writes one answer, and judges it when the home has a
reward model. Prints JSON. Without an adapter the bare base answers, and the output says so.
"""

import argparse
import json

from hominem_mlx import Registry, RewardModel, generate, load
from hominem_mlx.config import home_folder, load_config
from hominem_mlx.models.lora import load_adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("--home", help="else $HOMINEM_HOME, else ~/.hominem")
    parser.add_argument("--max-tokens", type=int, default=128)
    arguments = parser.parse_args()

    home = home_folder(arguments.home)
    config, registry = load_config(home), Registry(home)
    lm = load(config.student.base, revision=config.student.revision)
    adapter = registry.current("lora", pointer=lm.pointer)  # adapters belong to the base they were trained on
    if adapter is not None:
        load_adapter(lm, adapter.folder)
    [answer] = generate(lm, [arguments.prompt], max_tokens=arguments.max_tokens, system=config.student.system)
    said = {"prompt": arguments.prompt, "answer": answer, "adapter": adapter and adapter.ref}

    judge = registry.current("reward_model")
    if judge is not None:
        output = RewardModel.load(judge.folder, lm=lm).score(arguments.prompt, answer)
        said |= {"reward": output.scalar, "safety": output.safety_score, "by_dimension": output.reward_vector}
    print(json.dumps(said, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
