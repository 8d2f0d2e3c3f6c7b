"""The demo tasks by name."""

from tasks import intent, json_extract, sql

TASKS = {task.name: task for task in (sql.TASK, json_extract.TASK, intent.TASK)}
