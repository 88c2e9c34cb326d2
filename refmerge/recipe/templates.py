"""Chat templates: those that a recipe may name, and the one that most of its models have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from refmerge.checkpoint import Checkpoint
from refmerge.checkpoint.files import read_small, there
from refmerge.errors import UsageError
from refmerge.recipe.document import quote
from refmerge.recipe.tokenizers import read_json_file

__all__ = ["TEMPLATES", "template_for", "template_of"]

_LARGEST = 1 << 20  # bytes of a template

TEMPLATES = {
    "alpaca": """\
{%- for m in messages if m['role'] == 'system' -%}
    {%- if loop.last %}{{ m['content'] | trim + '\\n\\n' }}{% endif -%}
{%- endfor -%}
{%- set titles = {'user': 'Instruction', 'assistant': 'Response', 'user_context': 'Input'} -%}
{%- for m in messages if m['role'] in titles -%}
    {{- '### ' + titles[m['role']] + ':\\n' + m['content'] | trim + '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '### Response:\\n' }}{% endif -%}
""",
    "chatml": """\
{%- for m in messages -%}
    {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
""",
    "exaone": """\
{%- if messages and messages[0]['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif -%}
{%- for m in messages -%}
    {{- '[|' + m['role'] + '|]' + m['content'] + ('\\n' if m['role'] == 'user' else '[|endofturn|]\\n') -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '[|assistant|]' }}{% endif -%}
""",
    "llama3": """\
{{- bos_token -}}
{%- for m in messages -%}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif -%}
""",
    "mistral": """\
{{- bos_token -}}
{%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' -%}
{%- for m in (messages[1:] if system else messages) -%}
    {%- if m['role'] != ('assistant' if loop.index0 % 2 else 'user') -%}
        {{- raise_exception('after a system message, user and assistant take turns') -}}
    {%- elif m['role'] == 'user' -%}
        {{- ' [INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + m['content'] + eos_token -}}
    {%- endif -%}
{%- endfor -%}
""",
}


def template_for(wanted: str, models: Iterable[Checkpoint]) -> str | None:
    """The text of the template that a recipe asks for: by a name, `auto` for the one that most models have (the first of
    several; None where no model has one), or as a text in Jinja. UsageError for any other word."""
    if wanted == "auto":
        found = Counter(text.strip() for c in models if (text := template_of(c)))
        return found.most_common(1)[0][0] if found else None
    if wanted in TEMPLATES:
        return TEMPLATES[wanted]
    if "{" not in wanted:
        raise UsageError(f"chat_template {quote(wanted)} is no Jinja text and none of auto, {', '.join(TEMPLATES)}")
    return wanted


def template_of(checkpoint: Checkpoint) -> str | None:
    """A model's chat template, None where it has none."""
    folder = checkpoint.directory
    if folder is None:
        return None
    if there(folder / "chat_template.jinja"):
        return read_small(folder / "chat_template.jinja", _LARGEST).decode("utf-8", "replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found: Any = (read_json_file(folder / name) or {}).get("chat_template")
        if isinstance(found, list):  # several by name
            found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str):
            return found
    return None
