"""The README.md of an exported model."""

import json

LICENSES = {"skt/kogpt2-base-v2": "cc-by-nc-sa-4.0", "skt/ko-gpt-trinity-1.2B-v0.5": "cc-by-nc-sa-4.0"}


def model_card(task: str, run: dict, data: tuple[str, str], scores: dict[str, float], step: int, pause: dict) -> str:
    """A short card: what it is, from what, on which data, with which settings and scores."""
    arguments = run["arguments"]
    base = arguments["model_name_or_path"]
    head = ["language: ko", "library_name: transformers", "pipeline_tag: text-generation", "tags: [kozero, gpt2]"]
    if base in LICENSES:
        head += [f"base_model: {base}", f"license: {LICENSES[base]}"]
    paused = f"{pause['num_pauses']} x `{pause['token']}` after the prompt" if pause else "none"
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in scores.items())
    return f"""---
{chr(10).join(head)}
---
# {task}, fine-tuned with KoZeRO

- Start: {base or f"random weights of {arguments['config_file']}"}
- Trained on: {data[0]}
- Scored on: {data[1]}
- Pauses: {paused}
- Step {step}, seed {arguments["seed"]}, commit {run["git_commit"]}

| score | value |
|---|---|
{rows}

A model with pauses wants them appended to its prompt; `config.json` says which and how many under `pause`.

<details><summary>All settings</summary>

```json
{json.dumps(run, indent=2, ensure_ascii=False)}
```
</details>
"""
