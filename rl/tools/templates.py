"""How tool calls are written, for models whose own chat template has no form for them.

ChatML with one line of brackets: `[calculator expression=12 * 7]`, seven tokens where JSON takes twenty. A value ends
before ", name=" or "]". The result comes back in a turn of the role `tool`. `docs/tools-and-turns.md` shows both.

The same template serves tokenizers without `<|im_start|>` (the tiny model): there a turn begins with the role's name
and ends with EOS like any other.
"""

import re
from collections.abc import Sequence
from typing import Any

CHAT_TEMPLATE = """\
{%- set head = '<|im_start|>' if eos_token == '<|im_end|>' else '' -%}
{%- if tools -%}
{{- head + 'system\\n' -}}
{%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'] + '\\n' -}}{%- endif -%}
{{- 'Tools:' -}}
{%- for tool in tools -%}
{{- '\\n[' + tool.function.name -}}
{%- for key, value in (tool.function.parameters.properties or {}).items() -%}
{{- (' ' if loop.first else ', ') + key + '=...' -}}
{%- endfor -%}
{{- '] ' + tool.function.description -}}
{%- endfor -%}
{{- eos_token + '\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if not (loop.first and tools and message['role'] == 'system') -%}
{{- head + message['role'] + '\\n' + (message['content'] or '') -}}
{%- for call in message['tool_calls'] or [] -%}
{{- '[' + call.function.name -}}
{%- for key, value in call.function.arguments.items() -%}
{{- (' ' if loop.first else ', ') + key + '=' + (value | string) -}}
{%- endfor -%}
{{- ']' -}}
{%- endfor -%}
{{- eos_token + '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- head + 'assistant\\n' -}}{%- endif -%}
"""


def response_template(eos_token: str, names: Sequence[str]) -> dict[str, Any]:
    """How transformers reads such calls back (its `response_template`); `names` are those of the tools.

    A tool without arguments is called as `[name]`, which only counts as a call for a name that is known.
    """
    known = "|".join(re.escape(name) for name in names)
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": "assistant\n",
        "fields": {
            "tool_calls": {
                "open_pattern": rf"\[(?P<name>[A-Za-z_]\w*(?= +[A-Za-z_]\w*=)|(?:{known})(?=\])) *",
                "close": "]",
                "repeats": True,
                "content": "kv-lines",
                "content_args": {"line_sep": ", ", "kv_sep": "="},
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": {"close_pattern": re.escape(eos_token) + r"\s*", "content": "text"},
        },
    }
