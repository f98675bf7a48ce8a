"""POST /answers: prompts in, answers and who gave them out."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from recycler.run import answered_prompts

router = APIRouter()


class Question(BaseModel):
    prompts: list[str] = Field(min_length=1, max_length=32)
    max_new_tokens: int = Field(16, ge=1, le=256)


class Answer(BaseModel):
    text: str
    shares: dict[str, float]


@router.post("/answers")
def answers(question: Question, request: Request) -> list[Answer]:
    """A plain function: FastAPI runs it in a thread, so that the event loop stays free while the model works."""
    with request.app.state.turn:
        rows = answered_prompts(request.app.state.model, question.prompts, max_new_tokens=question.max_new_tokens, explain=True)
    return [Answer(text=row["generated"], shares=row["routing"]["shares"]) for row in rows]
