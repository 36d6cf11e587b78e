import pytest


@pytest.fixture
def board(tmp_path):
    from helpers.boards import Board

    board = Board(tmp_path)
    yield board
    board.writer.close()
