#!/usr/bin/env python3
"""Asks a running jamba-serve for everything with the official client.

    openai_client.py URL KEY          (scripts/check-server starts both)
"""

import asyncio
import json
import sys
from typing import Annotated, Literal

import openai
import pydantic

url, key = sys.argv[1:]
arguments = {"base_url": f"{url}/v1", "api_key": key, "max_retries": 0, "timeout": 60}
client = openai.OpenAI(**arguments)
model = client.models.list().data[0].id
assert client.models.retrieve(model).id == model
messages = [{"role": "user", "content": "Tell me of a fox."}]


def ask(**fields):
    return client.chat.completions.create(**{"model": model, "messages": messages, **fields})


def text_of(chunks, index=0):
    choices = (choice for chunk in chunks for choice in chunk.choices if choice.index == index)
    return "".join(choice.delta.content or "" for choice in choices)


# Whole and streamed, several choices, probabilities, seeds, stop strings.
whole = ask(max_tokens=20, seed=1, n=2, logprobs=True, top_logprobs=3)
assert [choice.finish_reason for choice in whole.choices] == ["length", "length"]
assert whole.choices[0].message.content != whole.choices[1].message.content
assert whole.usage.completion_tokens == 40 and whole.usage.total_tokens == 40 + whole.usage.prompt_tokens
for choice in whole.choices:
    tokens = choice.logprobs.content
    assert len(tokens) == 20 and all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens)
    assert "".join(token.token for token in tokens) == choice.message.content
chunks = list(ask(max_tokens=20, seed=1, n=2, stream=True, stream_options={"include_usage": True}))
assert [text_of(chunks, i) for i in (0, 1)] == [choice.message.content for choice in whole.choices]
assert chunks[-1].usage.completion_tokens == 40 and chunks[-1].usage.prompt_tokens_details.cached_tokens > 0
greedy = ask(max_completion_tokens=20, temperature=0).choices[0]
word = greedy.message.content.split()[4]
stopped = ask(max_tokens=20, temperature=0, stop=[word, "no such word"]).choices[0]
assert stopped.finish_reason == "stop" and stopped.message.content == greedy.message.content.split(word)[0]
legacy = client.completions.create(model=model, prompt=["A fox", "An owl"], max_tokens=4, echo=True)
assert [choice.text[:4] for choice in legacy.choices] == ["A fo", "An o"]
# A prompt is scored, and nothing is generated: the first token follows nothing.
scored = client.completions.create(model=model, prompt="Once upon a time", max_tokens=0, echo=True, logprobs=2)
told = scored.choices[0].logprobs
assert scored.choices[0].text == "Once upon a time" and scored.usage.completion_tokens == 0
assert told.token_logprobs[0] is None and all(logprob <= 0 for logprob in told.token_logprobs[1:])
assert len(told.tokens) == len(told.text_offset) == len(told.top_logprobs) == scored.usage.prompt_tokens
for token, offset in zip(told.tokens[1:], told.text_offset[1:]):
    assert "Once upon a time"[offset:].startswith(token), (token, offset)

# A stream that is left early does not go on.
with ask(max_tokens=2000, stream=True) as stream:
    assert next(iter(stream)).choices


# Structured output: the client makes the schema, and reads the reply back.
class Hero(pydantic.BaseModel):
    animal: Literal["fox", "owl"]
    age: Annotated[int, pydantic.Field(ge=1, le=99)]
    friends: Annotated[list[Literal["bear", "hen"]], pydantic.Field(max_length=2)]


for temperature in (0, 2):
    asked = {"model": model, "messages": messages, "response_format": Hero, "temperature": temperature}
    hero = client.chat.completions.parse(**asked).choices[0].message.parsed
    assert isinstance(hero, Hero)
    with client.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        assert {"chunk", "content.delta", "content.done"} <= kinds, kinds
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Hero)
held = ask(response_format={"type": "json_object"}, max_tokens=200, temperature=0)
assert held.choices[0].finish_reason == "length" or isinstance(json.loads(held.choices[0].message.content), dict)

# Tools: one of two, the named one, streamed; then what it returned.
tools = [openai.pydantic_function_tool(Hero, name=name) for name in ("feed", "greet")]
call = ask(tools=tools, tool_choice="required").choices[0].message.tool_calls[0]
assert call.function.name in ("feed", "greet") and Hero.model_validate_json(call.function.arguments)
named = {"type": "function", "function": {"name": "greet"}}
with client.chat.completions.stream(model=model, messages=messages, tools=tools, tool_choice=named) as stream:
    done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
    final = stream.get_final_completion().choices[0]
assert [event.name for event in done] == ["greet"] and isinstance(done[0].parsed_arguments, Hero)
assert final.finish_reason == "tool_calls"
turn = [*messages, final.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": final.message.tool_calls[0].id, "content": "fed"}]
assert ask(messages=turn, tools=tools, max_tokens=5).choices[0].message.role == "assistant"

# Errors come as the client's own.
for wrong, error in [
    ({"model": "gpt-4"}, openai.NotFoundError),
    ({"temperature": -1}, openai.BadRequestError),
    ({"messages": []}, openai.BadRequestError),
    ({"messages": [{"role": "user", "content": "fox " * 9000}]}, openai.BadRequestError),
    ({"response_format": {"type": "yaml"}}, openai.BadRequestError),
    ({"tools": tools, "tool_choice": {"type": "function", "function": {"name": "no"}}}, openai.BadRequestError),
]:
    try:
        ask(**wrong)
    except error as e:
        assert e.body["message"] and e.body["type"] and "code" in e.body, e.body
    else:
        raise AssertionError(f"{wrong} was taken")
try:
    openai.OpenAI(**{**arguments, "api_key": "another"}).models.list()
except openai.AuthenticationError:
    pass
else:
    raise AssertionError("another key was taken")


# 64 streams at the same time are what each is alone.
async def together(number):
    others = openai.AsyncOpenAI(**arguments)

    async def one(seed):
        stream = await others.chat.completions.create(
            model=model, messages=messages, max_tokens=24, temperature=1, seed=seed, stream=True)
        return text_of([chunk async for chunk in stream])

    return await asyncio.gather(*map(one, range(number)))


def alone(seed):
    return ask(max_tokens=24, temperature=1, seed=seed).choices[0].message.content


assert asyncio.run(together(64)) == list(map(alone, range(64)))
print(f"openai {openai.__version__}: chat, streams, choices, probabilities, scores, stops, schemas, tools, errors, 64 at once")
