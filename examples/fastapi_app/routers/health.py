"""GET /health: which adapters answer here."""

from __future__ import annotations

from fastapi import APIRouter, Request

router = APIRouter()


@router.get("/health")
def health(request: Request) -> dict[str, list[str]]:
    return {"adapters": list(request.app.state.model.names)}
