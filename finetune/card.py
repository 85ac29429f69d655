"""The README.md of an exported model."""

import json

LICENSES = {"skt/kogpt2-base-v2": "cc-by-nc-sa-4.0", "skt/ko-gpt-trinity-1.2B-v0.5": "cc-by-nc-sa-4.0"}


def model_card(task: str, run: dict, data: tuple[str, str], scores: dict[str, float], step: int, pause: dict) -> str:
    """The card of a language model."""
    token = pause.get("token", ".")  # full stops that pause are no token of their own
    paused = f"{pause['num_pauses']} x `{token}`, {pause['placement']}" if pause else "none"
    use = (
        "A model with pauses wants them in its prompt; `config.json` says which, where and how many under `pause`, and "
        "`PausedGenerator.from_pretrained` of KoZeRO's finetune/paused.py puts them there."
    )
    head = ["pipeline_tag: text-generation", "tags: [kozero, gpt2]"]
    return card(head, task, run, data, scores, step, [f"Pauses: {paused}"], use)


def encoder_card(task: str, run: dict, data: tuple[str, str], scores: dict[str, float], step: int) -> str:
    """The card of an encoder."""
    use = (
        "`AutoModel.from_pretrained` loads the encoder after `import models.encoders` of KoZeRO; what stands on it is "
        "in `heads.safetensors`."
    )
    return card(["tags: [kozero]"], task, run, data, scores, step, [], use)


def card(
    head: list[str],
    task: str,
    run: dict,
    data: tuple[str, str],
    scores: dict[str, float],
    step: int,
    facts: list[str],
    use: str,
) -> str:
    """A short card: what it is, from what, on which data, with which settings and scores, and how it is used."""
    arguments = run["arguments"]
    base = arguments["model_name_or_path"]
    head = ["language: ko", "library_name: transformers", *head]
    if base in LICENSES:
        head += [f"base_model: {base}", f"license: {LICENSES[base]}"]
    facts = [
        f"Start: {base or 'random weights of ' + str(arguments['config_file'])}",
        f"Trained on: {data[0]}",
        f"Scored on: {data[1]}",
        *facts,
        f"Step {step}, seed {arguments['seed']}, commit {run['git_commit']}",
    ]
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in scores.items())
    return f"""---
{chr(10).join(head)}
---
# {task}, fine-tuned with KoZeRO

{chr(10).join(f"- {fact}" for fact in facts)}

| score | value |
|---|---|
{rows}

{use}

<details><summary>All settings</summary>

```json
{json.dumps(run, indent=2, ensure_ascii=False)}
```
</details>
"""
