-- klieo-bus, functions: what a worker or consumer needs that has nothing but a connection, in any language. They check their arguments as
-- enqueue() does and say in a value what became of a settlement; beneath them are the functions that the packages call. docs/sql.md is their
-- reference, docs/adr/0012-foreign-workers.md says why they are as they are.
--
-- A settlement that comes too late answers false (a heartbeat null) and raises nothing: it may run in the caller's own transaction, beside
-- what the handler wrote, and the caller decides what becomes of that.
--
-- Claiming and fetching are for transactions of their own. A claim that is rolled back with its work counts no attempt, so that a job which
-- kills its worker would come back for ever; and nobody but the claiming transaction could extend a lease that it has not committed.
-- What can be seen of that is refused: a transaction that has written.

create function klieo.check_id(argument text, id text) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp as $$
begin
  if id is null or length(id) not between 1 and 512 then
    raise exception '% must be 1 to 512 characters', argument using errcode = '22023';
  end if;
end
$$;
comment on function klieo.check_id(text, text) is 'Raises 22023 unless it is free text that may name something.';

create function klieo.check_number(argument text, value bigint, lowest bigint, highest bigint) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp as $$
begin
  if check_number.value is null or check_number.value not between check_number.lowest and check_number.highest then
    raise exception '% must be from % to %', argument, check_number.lowest, check_number.highest using errcode = '22023';
  end if;
end
$$;
comment on function klieo.check_number(text, bigint, bigint, bigint) is 'Raises 22023 unless the value is in the range.';

create function klieo.check_holder(argument text, id bigint, token uuid) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp as $$
begin
  if id is null then
    raise exception '% must not be null', argument using errcode = '22023';
  elsif token is null then
    raise exception 'token must not be null' using errcode = '22023';
  end if;
end
$$;
comment on function klieo.check_holder(text, bigint, uuid) is 'Raises 22023 unless there is something to be settled, and a token.';

create function klieo.check_durable(durable text) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp as $$
begin
  if durable is null or durable !~ '^[A-Za-z0-9_-]{1,128}$' then
    raise exception 'durable must be 1 to 128 characters of A-Z a-z 0-9 _ -' using errcode = '22023';
  end if;
end
$$;
comment on function klieo.check_durable(text) is 'Raises 22023 unless it may name a durable.';

create function klieo.check_unwritten(what text) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp as $$
begin
  if pg_current_xact_id_if_assigned() is not null then
    raise exception '% must not be in a transaction that has written: commit first', what using errcode = 'KB002';
  end if;
end
$$;
comment on function klieo.check_unwritten(text) is 'Raises KB002 in a transaction that has written.';

-- ---------------------------------------------------------------- jobs

create function klieo.claim(queue text, worker_id text, lease_ttl_ms bigint default 30000, max_jobs int default 1)
returns table (id bigint, payload bytea, headers jsonb, attempt int, max_attempts int, fence int, token uuid, leased_until timestamptz)
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
  perform klieo.check_name('queue', claim.queue);
  perform klieo.check_id('worker_id', claim.worker_id);
  perform klieo.check_number('lease_ttl_ms', claim.lease_ttl_ms, 0, 2147483647);
  perform klieo.check_number('max_jobs', claim.max_jobs, 1, 1000);
  perform klieo.check_unwritten('a claim');
  return query
    select c.id, c.payload, c.headers, c.attempt, c.max_attempts, c.fence, c.token, c.expires_at
    from klieo.claim_jobs(claim.queue, claim.worker_id, claim.lease_ttl_ms, claim.max_jobs) c;
end
$$;
comment on function klieo.claim(text, text, bigint, int) is
  'Claims up to max_jobs jobs, best first, with about 16 MiB of payload; each comes with a token, without which nobody settles it. Commit before you begin to work.';

create function klieo.heartbeat(id bigint, token uuid, lease_ttl_ms bigint default 30000) returns timestamptz
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
begin
  perform klieo.check_holder('id', heartbeat.id, heartbeat.token);
  perform klieo.check_number('lease_ttl_ms', heartbeat.lease_ttl_ms, 0, 2147483647);
  return (select h.until from klieo.heartbeat_job(heartbeat.id, heartbeat.token, heartbeat.lease_ttl_ms) h);
end
$$;
comment on function klieo.heartbeat(bigint, uuid, bigint) is
  'Extends the lease of a claimed job to lease_ttl_ms from now, never shortening it; answers its end, or null when the job is not yours any more.';

create function klieo.ack(id bigint, token uuid) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
begin
  perform klieo.check_holder('id', ack.id, ack.token);
  return klieo.ack_job(ack.id, ack.token);
end
$$;
comment on function klieo.ack(bigint, uuid) is
  'Ends a job that is done, with the transaction; false: it is not yours any more, and nothing has changed.';

create function klieo.nak(id bigint, token uuid, delay_ms bigint default null, error text default null) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
  v_attempts int;
  v_delay_ms bigint := nak.delay_ms;
begin
  perform klieo.check_holder('id', nak.id, nak.token);
  if v_delay_ms is not null then
    perform klieo.check_number('delay_ms', v_delay_ms, 0, 2147483647);
  else
    select j.attempts into v_attempts from klieo.jobs j where j.id = nak.id and j.token = nak.token;
    if not found then
      return false;
    end if;
    -- A second, doubled with each attempt up to an hour, and cut at random by up to half, so that what failed together does not
    -- come back together.
    v_delay_ms := round(least(3600000, 1000 * 2 ^ least(v_attempts - 1, 30)) * (0.5 + random() / 2));
  end if;
  return exists (select from klieo.nak_jobs(array[nak.id], array[nak.token], array[v_delay_ms], array[left(nak.error, 4000)]));
end
$$;
comment on function klieo.nak(bigint, uuid, bigint, text) is
  'Gives a job back after a failure, claimable after delay_ms (null: after a backoff), with the error in last_error; after its last attempt it is dead. False: it is not yours any more, and nothing has changed.';

create function klieo.release(id bigint, token uuid) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
begin
  perform klieo.check_holder('id', release.id, release.token);
  return exists (select from klieo.release_jobs(array[release.id], array[release.token], array[false]));
end
$$;
comment on function klieo.release(bigint, uuid) is
  'Gives back a job whose handling has not begun, as if it had not been claimed. False: it is not yours any more, or another session has it locked; nothing has changed.';

create function klieo.dead_letter(id bigint, token uuid, reason text) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
begin
  perform klieo.check_holder('id', dead_letter.id, dead_letter.token);
  if dead_letter.reason is null then
    raise exception 'reason must not be null' using errcode = '22023';
  end if;
  return exists (select from klieo.dead_letter_jobs(array[dead_letter.id], array[dead_letter.token], array[dead_letter.reason]));
end
$$;
comment on function klieo.dead_letter(bigint, uuid, text) is
  'Makes a claimed job dead at once and publishes its dead letter with the reason. False: it is not yours any more, and nothing has changed.';

-- ---------------------------------------------------------------- publish / subscribe

create function klieo.subscribe(
  durable text, filter text, start text default 'all', start_seq bigint default null, start_time timestamptz default null)
returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
declare
  v_filter text;
begin
  perform klieo.check_durable(subscribe.durable);
  perform klieo.check_filter(subscribe.filter);
  if subscribe.start is null or subscribe.start not in ('all', 'new') then
    raise exception 'start must be all or new' using errcode = '22023';
  elsif num_nonnulls(nullif(subscribe.start, 'all'), subscribe.start_seq, subscribe.start_time) > 1 then
    raise exception 'start must be given once: as new, as start_seq or as start_time' using errcode = '22023';
  elsif subscribe.start_seq is not null then
    perform klieo.check_number('start_seq', subscribe.start_seq, 0, 9007199254740991);
  end if;
  loop
    perform klieo.create_durable(subscribe.durable, subscribe.filter, subscribe.start_seq, subscribe.start_time, subscribe.start = 'new');
    if found then
      return true;
    end if;
    select f.filter into v_filter from klieo.find_durable(subscribe.durable) f;
    -- Unless it was deleted between the two statements: once more.
    exit when found;
  end loop;
  if v_filter <> subscribe.filter then
    raise exception 'the durable exists with another filter' using errcode = 'KB005';
  end if;
  return false;
end
$$;
comment on function klieo.subscribe(text, text, text, bigint, timestamptz) is
  'Makes a durable unless there is one; answers whether it did. It begins with all that is stored, with what is new, at a seq or at a time; one that is there keeps its position.';

create function klieo.fetch(
  durable text, max_messages int default 1, ack_wait_ms bigint default 30000, max_deliver int default null, max_ack_pending int default 1000)
returns table (seq bigint, subject text, headers jsonb, payload bytea, published_at timestamptz, attempt int, token uuid)
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
  v_id int;
begin
  perform klieo.check_durable("fetch".durable);
  perform klieo.check_number('max_messages', "fetch".max_messages, 1, 1000);
  perform klieo.check_number('ack_wait_ms', "fetch".ack_wait_ms, 1, 2147483647);
  perform klieo.check_number('max_deliver', coalesce("fetch".max_deliver, 1), 1, 2147483647);
  perform klieo.check_number('max_ack_pending', "fetch".max_ack_pending, 1, 2147483647);
  select f.id into v_id from klieo.find_durable("fetch".durable) f;
  if not found then
    raise exception 'the durable does not exist' using errcode = 'KB001';
  end if;
  -- Who is handed nothing pauses, and does not learn that there is more. So he walks farther past what is not for him: for a third of a second.
  return query
    select m.seq, m.subject, m.headers, m.payload, m.published_at, m.attempt, m.token
    from klieo.fetch_messages(v_id, "fetch".max_messages, "fetch".ack_wait_ms, "fetch".max_ack_pending, "fetch".max_deliver, 16777216, 50000) m
    where m.seq is not null;
end
$$;
comment on function klieo.fetch(text, int, bigint, int, int) is
  'Hands out messages of a durable: redeliveries that are due, then new ones, with about 16 MiB of payload; each comes with a token, without which nobody settles it. Commit before you begin to work.';

create function klieo.bury(durable text, max_messages int default 1000) returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
declare
  v_id int;
begin
  perform klieo.check_durable(bury.durable);
  perform klieo.check_number('max_messages', bury.max_messages, 1, 1000);
  select f.id into v_id from klieo.find_durable(bury.durable) f;
  if not found then
    raise exception 'the durable does not exist' using errcode = 'KB001';
  end if;
  return klieo.bury_deliveries(v_id, bury.max_messages);
end
$$;
comment on function klieo.bury(text, int) is
  'Publishes on <durable>.dlq what was left unsettled at its last delivery (max_deliver), and ends it; answers how many. In a transaction of its own, never beside a fetch.';

create function klieo.ack_message(durable text, seq bigint, token uuid) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
  perform klieo.check_durable(ack_message.durable);
  perform klieo.check_holder('seq', ack_message.seq, ack_message.token);
  return exists (
    select from klieo.find_durable(ack_message.durable) f
    cross join lateral klieo.ack_deliveries(array[f.id], array[ack_message.seq], array[ack_message.token]) n);
end
$$;
comment on function klieo.ack_message(text, bigint, uuid) is
  'Ends a message for its durable, with the transaction; false: it is not yours any more, and nothing has changed.';

create function klieo.nak_message(durable text, seq bigint, token uuid, delay_ms bigint default 0) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
  perform klieo.check_durable(nak_message.durable);
  perform klieo.check_holder('seq', nak_message.seq, nak_message.token);
  perform klieo.check_number('delay_ms', nak_message.delay_ms, 0, 2147483647);
  return exists (
    select from klieo.find_durable(nak_message.durable) f
    cross join lateral klieo.nak_deliveries(array[f.id], array[nak_message.seq], array[nak_message.token], array[nak_message.delay_ms]) n);
end
$$;
comment on function klieo.nak_message(text, bigint, uuid, bigint) is
  'Gives a message back, to be handed out again after delay_ms; at its last delivery it goes to <durable>.dlq. False: it is not yours any more, and nothing has changed.';

create function klieo.term_message(durable text, seq bigint, token uuid) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
begin
  return klieo.ack_message(term_message.durable, term_message.seq, term_message.token);
end
$$;
comment on function klieo.term_message(text, bigint, uuid) is
  'Ends a message that is never to come again to this durable, though nothing came of it; false: it is not yours any more, and nothing has changed.';

create function klieo.extend_message(durable text, seq bigint, token uuid, ack_wait_ms bigint default 30000) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
  perform klieo.check_durable(extend_message.durable);
  perform klieo.check_holder('seq', extend_message.seq, extend_message.token);
  perform klieo.check_number('ack_wait_ms', extend_message.ack_wait_ms, 1, 2147483647);
  return exists (
    select from klieo.find_durable(extend_message.durable) f
    cross join lateral klieo.extend_deliveries(array[f.id], array[extend_message.seq], array[extend_message.token], array[extend_message.ack_wait_ms]) e);
end
$$;
comment on function klieo.extend_message(text, bigint, uuid, bigint) is
  'Gives a handler ack_wait_ms from now on, never less than it had; false: the message is not yours any more.';

create function klieo.release_message(durable text, seq bigint, token uuid) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
  perform klieo.check_durable(release_message.durable);
  perform klieo.check_holder('seq', release_message.seq, release_message.token);
  return exists (
    select from klieo.find_durable(release_message.durable) f
    cross join lateral klieo.release_deliveries(array[f.id], array[release_message.seq], array[release_message.token]) n);
end
$$;
comment on function klieo.release_message(text, bigint, uuid) is
  'Gives back a message whose handling has not begun, without counting the delivery. False: it is not yours any more, or another session has it locked; nothing has changed.';

-- ---------------------------------------------------------------- wake-ups

create function klieo.channel() returns text
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp as $$
begin
  return 'klieo_' || left(encode(sha256(convert_to(klieo.schema_name()::text, 'UTF8')), 'hex'), 16);
end
$$;
comment on function klieo.channel() is 'The channel to LISTEN on: what processes of the package commit is told there as JSON whose topics are texts like queue:mail and message:orders.created. A hint, which may come too often or never.';
