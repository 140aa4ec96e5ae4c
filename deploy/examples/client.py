"""Train an adapter and ask it, with nothing but OpenAI's client.

export OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none
python deploy/examples/client.py [MODEL [ROWS]]
"""

import sys
import time
from pathlib import Path

import openai

model, rows = (sys.argv[1:] + ["smollm2-135m", "jobs/examples/tone.jsonl"][len(sys.argv) - 1 :])[:2]
client = openai.OpenAI()

file = client.files.create(file=Path(rows), purpose="fine-tune")
print(file.id, file.status)
job = client.fine_tuning.jobs.create(
    model=model,
    training_file=file.id,
    suffix="tone",
    hyperparameters={"n_epochs": 3, "learning_rate_multiplier": 5},
    extra_body={"lora": {"r": 8}, "train": {"max_seq_len": 128}},
)
seen = None
while job.status not in ("succeeded", "failed", "cancelled"):
    if job.status != seen:
        print(job.id, seen := job.status)
    time.sleep(1)
    job = client.fine_tuning.jobs.retrieve(job.id)
print(job.id, job.status, job.fine_tuned_model or job.error)
if job.fine_tuned_model is None:
    sys.exit(1)

messages = [
    {"role": "system", "content": "Rewrite the message politely."},
    {"role": "user", "content": "Send me the report today."},
]
for asked in (model, job.fine_tuned_model):
    answer = client.chat.completions.create(model=asked, messages=messages, temperature=0, max_tokens=40)
    print(f"{asked}: {answer.choices[0].message.content}")
