-- A queue as it was before alembic: SQLite's own dump, in words that PostgreSQL takes too (there events.id is SERIAL).
CREATE TABLE events (
    id INTEGER NOT NULL,
    subject TEXT NOT NULL,
    at DOUBLE PRECISION NOT NULL,
    level TEXT NOT NULL,
    message TEXT NOT NULL,
    data TEXT,
    PRIMARY KEY (id)
);
INSERT INTO events (subject, at, level, message, data) VALUES ('job-000000000001',1001.0,'info','submitted','{"adapter": "base:waiting"}');
INSERT INTO events (subject, at, level, message, data) VALUES ('job-000000000002',1003.0,'info','submitted','{"adapter": "base:running"}');
INSERT INTO events (subject, at, level, message, data) VALUES ('job-000000000003',1005.0,'info','submitted','{"adapter": "base:done"}');
INSERT INTO events (subject, at, level, message, data) VALUES ('job-000000000004',1007.0,'info','submitted','{"adapter": "base:cancelling"}');
INSERT INTO events (subject, at, level, message, data) VALUES ('session-00000005',1010.0,'info','launching','{"session_key": "base|auto|1", "num_workers": 1}');
INSERT INTO events (subject, at, level, message, data) VALUES ('session-00000005',1012.0,'info','running: driver started','{"from": "launching"}');
INSERT INTO events (subject, at, level, message, data) VALUES ('job-000000000003',1014.0,'info','assigned to session-00000005','{"from": "queued", "to": "running"}');
INSERT INTO events (subject, at, level, message, data) VALUES ('job-000000000001',1016.0,'info','assigned to session-00000005','{"from": "queued", "to": "running"}');
INSERT INTO events (subject, at, level, message, data) VALUES ('job-000000000004',1018.0,'info','assigned to session-00000005','{"from": "queued", "to": "running"}');
INSERT INTO events (subject, at, level, message, data) VALUES ('session-00000005',1020.0,'info','computes in bf16, the faster one here; exact: bitwise',NULL);
INSERT INTO events (subject, at, level, message, data) VALUES ('job-000000000001',1021.0,'info','computes in bf16, the faster one here; exact: bitwise',NULL);
INSERT INTO events (subject, at, level, message, data) VALUES ('job-000000000003',1022.0,'info','computes in bf16, the faster one here; exact: bitwise',NULL);
INSERT INTO events (subject, at, level, message, data) VALUES ('job-000000000004',1023.0,'info','computes in bf16, the faster one here; exact: bitwise',NULL);
INSERT INTO events (subject, at, level, message, data) VALUES ('job-000000000003',1028.0,'info','published base:done version 12','{"from": "running", "to": "succeeded"}');
INSERT INTO events (subject, at, level, message, data) VALUES ('job-000000000004',1030.0,'info','asked to cancel',NULL);
INSERT INTO events (subject, at, level, message, data) VALUES ('job-000000000001',1032.0,'info','back to the queue: it died','{"from": "running", "to": "queued"}');
INSERT INTO events (subject, at, level, message, data) VALUES ('job-000000000001',1033.0,'warning','its session could not start: no disk',NULL);
INSERT INTO events (subject, at, level, message, data) VALUES ('job-000000000001',1034.0,'warning','its session could not start: no disk',NULL);
INSERT INTO events (subject, at, level, message, data) VALUES ('job-000000000001',1035.0,'info','waits: its session is being started',NULL);
INSERT INTO events (subject, at, level, message, data) VALUES ('session-00000006',1037.0,'info','launching','{"session_key": "base|fp32|2", "num_workers": 2}');
INSERT INTO events (subject, at, level, message, data) VALUES ('session-00000006',1039.0,'info','running: driver started','{"from": "launching"}');
INSERT INTO events (subject, at, level, message, data) VALUES ('job-000000000002',1041.0,'info','assigned to session-00000006','{"from": "queued", "to": "running"}');
INSERT INTO events (subject, at, level, message, data) VALUES ('job-000000000002',1043.0,'info','back to the queue, to be tried by itself: rank 1','{"from": "running", "to": "queued"}');
INSERT INTO events (subject, at, level, message, data) VALUES ('job-000000000002',1045.0,'info','assigned to session-00000006','{"from": "queued", "to": "running"}');
INSERT INTO events (subject, at, level, message, data) VALUES ('session-00000006',1047.0,'info','asked to stop: its workers are needed','{"from": "running"}');
CREATE TABLE jobs (
    id TEXT NOT NULL,
    tenant TEXT NOT NULL,
    cluster TEXT NOT NULL,
    status TEXT NOT NULL,
    priority INTEGER NOT NULL,
    spec_json TEXT NOT NULL,
    base TEXT NOT NULL,
    session_key TEXT NOT NULL,
    num_workers INTEGER NOT NULL,
    content_key TEXT NOT NULL,
    copy TEXT NOT NULL,
    code_version TEXT NOT NULL,
    dataset_sha TEXT NOT NULL,
    validation_sha TEXT,
    examples_sha TEXT,
    init_adapter_sha TEXT,
    created_at DOUBLE PRECISION NOT NULL,
    updated_at DOUBLE PRECISION NOT NULL,
    started_at DOUBLE PRECISION,
    finished_at DOUBLE PRECISION,
    session_id TEXT,
    attempt INTEGER NOT NULL,
    company INTEGER,
    wish TEXT,
    error TEXT,
    progress TEXT,
    result TEXT,
    PRIMARY KEY (id),
    CHECK (status IN ('validating_files', 'queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled')),
    CHECK (status <> 'running' OR session_id IS NOT NULL)
);
INSERT INTO jobs VALUES ('job-000000000001','default','c','queued',0,'{"adapter":"waiting","base_model":"base","dataset":"/rows.jsonl","init_adapter":null,"lora":{"alpha_pattern":{},"init_lora_weights":true,"layers_to_transform":null,"lora_alpha":32.0,"lora_dropout":0.0,"r":16,"rank_pattern":{},"target_modules":"all-linear","use_dora":false,"use_rslora":false},"num_workers":1,"precision":"auto","priority":0,"train":{"batch_size":8,"early_stopping_patience":null,"epochs":3,"eval_steps":null,"learning_rate":0.0002,"load_best_model_at_end":null,"loraplus_lr_ratio":1.0,"lr_scheduler":"cosine","max_grad_norm":1.0,"max_seq_len":1024,"overlong":"truncate","seed":0,"train_on":"completion","warmup_ratio":0.03,"weight_decay":0.0},"validation":null}','base','base|bf16|1',1,'28f6b83a4a16b89e2002c2c196c0661710f4bcc5190be99a3e68b9a40996fc07','','v1','d1',NULL,'e1',NULL,1000.0,1031.0,1015.0,NULL,NULL,1,NULL,NULL,NULL,NULL,NULL);
INSERT INTO jobs VALUES ('job-000000000002','default','c','running',0,'{"adapter":"running","base_model":"base","dataset":"/rows.jsonl","init_adapter":null,"lora":{"alpha_pattern":{},"init_lora_weights":true,"layers_to_transform":null,"lora_alpha":32.0,"lora_dropout":0.0,"r":16,"rank_pattern":{},"target_modules":"all-linear","use_dora":false,"use_rslora":false},"num_workers":2,"precision":"fp32","priority":0,"train":{"batch_size":8,"early_stopping_patience":null,"epochs":3,"eval_steps":null,"learning_rate":0.0002,"load_best_model_at_end":null,"loraplus_lr_ratio":1.0,"lr_scheduler":"cosine","max_grad_norm":1.0,"max_seq_len":1024,"overlong":"truncate","seed":0,"train_on":"completion","warmup_ratio":0.03,"weight_decay":0.0},"validation":null}','base','base|fp32|2',2,'a6bc9427412ff89a9986b1eae4e9449a463dcf6d14380247d25396c1c6840f81','','v1','d1',NULL,'e1',NULL,1002.0,1044.0,1040.0,NULL,'session-00000006',2,0,NULL,NULL,NULL,NULL);
INSERT INTO jobs VALUES ('job-000000000003','default','c','succeeded',0,'{"adapter":"done","base_model":"base","dataset":"/rows.jsonl","init_adapter":null,"lora":{"alpha_pattern":{},"init_lora_weights":true,"layers_to_transform":null,"lora_alpha":32.0,"lora_dropout":0.0,"r":16,"rank_pattern":{},"target_modules":"all-linear","use_dora":false,"use_rslora":false},"num_workers":1,"precision":"auto","priority":0,"train":{"batch_size":8,"early_stopping_patience":null,"epochs":3,"eval_steps":null,"learning_rate":0.0002,"load_best_model_at_end":null,"loraplus_lr_ratio":1.0,"lr_scheduler":"cosine","max_grad_norm":1.0,"max_seq_len":1024,"overlong":"truncate","seed":0,"train_on":"completion","warmup_ratio":0.03,"weight_decay":0.0},"validation":null}','base','base|bf16|1',1,'702bd5a3348bae000eda99cea96a91cfc2a1fd7820f6f1057996b848318ab259','','v1','d1',NULL,'e1',NULL,1004.0,1027.0,1013.0,1027.0,'session-00000005',1,NULL,NULL,NULL,'{"step": 5, "steps": 5, "loss": NaN}','{"model": "base:done", "version": "12", "metrics": {}}');
INSERT INTO jobs VALUES ('job-000000000004','default','c','running',0,'{"adapter":"cancelling","base_model":"base","dataset":"/rows.jsonl","init_adapter":null,"lora":{"alpha_pattern":{},"init_lora_weights":true,"layers_to_transform":null,"lora_alpha":32.0,"lora_dropout":0.0,"r":16,"rank_pattern":{},"target_modules":"all-linear","use_dora":false,"use_rslora":false},"num_workers":1,"precision":"auto","priority":0,"train":{"batch_size":8,"early_stopping_patience":null,"epochs":3,"eval_steps":null,"learning_rate":0.0002,"load_best_model_at_end":null,"loraplus_lr_ratio":1.0,"lr_scheduler":"cosine","max_grad_norm":1.0,"max_seq_len":1024,"overlong":"truncate","seed":0,"train_on":"completion","warmup_ratio":0.03,"weight_decay":0.0},"validation":null}','base','base|bf16|1',1,'3f1bad5a21539166dd313ec013b96ae716cb4377f3859512ee6115f7cee243af','','v1','d1',NULL,'e1',NULL,1006.0,1029.0,1017.0,NULL,'session-00000005',1,NULL,'cancel',NULL,NULL,NULL);
CREATE TABLE leases (
    name TEXT NOT NULL,
    holder TEXT NOT NULL,
    token INTEGER NOT NULL,
    until DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (name)
);
INSERT INTO leases VALUES ('scheduler:c','one',1,1013.0);
CREATE TABLE sessions (
    id TEXT NOT NULL,
    cluster TEXT NOT NULL,
    session_key TEXT NOT NULL,
    num_workers INTEGER NOT NULL,
    state TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    fence INTEGER NOT NULL,
    resolved_key TEXT,
    facts TEXT,
    lease_until DOUBLE PRECISION,
    wish TEXT,
    reason TEXT,
    created_at DOUBLE PRECISION NOT NULL,
    updated_at DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (id),
    CHECK (state IN ('launching', 'running', 'stopping', 'ended'))
);
INSERT INTO sessions VALUES ('session-00000005','c','base|auto|1',1,'running',1,1,'base|bf16|1','{"precision": "bf16", "why": "the faster one here", "exactness": "bitwise"}',1039.0,NULL,'driver started',1009.0,1025.0);
INSERT INTO sessions VALUES ('session-00000006','c','base|fp32|2',2,'running',1,1,NULL,NULL,NULL,'stop','its workers are needed',1036.0,1046.0);
CREATE UNIQUE INDEX jobs_by_content ON jobs (tenant, cluster, content_key, copy) WHERE (status NOT IN ('cancelled', 'failed'));
CREATE INDEX jobs_by_status ON jobs (cluster, status);
CREATE INDEX jobs_by_session ON jobs (session_id);
CREATE INDEX events_by_subject ON events (subject, id);
CREATE INDEX sessions_by_state ON sessions (cluster, state);
