-- klieo-bus, functions: request and reply. The tables are unlogged, so these transactions wait for no disk, and a notification sent along
-- holds the commit lock for microseconds. What the callers' own processes are called (inboxes, numbers) is theirs to choose: these
-- functions are for the packages.

-- The time of a request runs from when the statement came in, whatever it waits for: now() is the start of the transaction, and
-- that is this statement.
create function klieo.send_request(
  id uuid, subject text, headers jsonb, payload bytea, inbox text, timeout_ms double precision, channel text, notice text)
returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if not klieo.live_responders(send_request.subject) then
    return false;
  end if;
  insert into klieo.requests (id, subject, headers, payload, inbox, deadline)
  values (send_request.id, send_request.subject, send_request.headers, send_request.payload, send_request.inbox,
    now() + make_interval(secs => send_request.timeout_ms / 1000));
  if send_request.channel is not null then
    perform pg_notify(send_request.channel, send_request.notice);
  end if;
  return true;
end
$$;
comment on function klieo.send_request(uuid, text, jsonb, bytea, text, double precision, text, text) is
  'Sends a request if a live responder takes its subject, and tells the channel, unless that is null; answers whether it did.';

create function klieo.withdraw_request(id uuid) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
  delete from klieo.requests r where r.id = withdraw_request.id;
end
$$;
comment on function klieo.withdraw_request(uuid) is 'Takes a request back.';

create function klieo.claim_requests(filter text, process int, max_requests int)
returns table (id uuid, subject text, headers jsonb, payload bytea, left_ms double precision)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
  v_pattern text := klieo.filter_pattern(claim_requests.filter);
begin
  return query
    with open as materialized (
      select r.id
      from klieo.requests r
      where r.claimed_by is null and r.deadline > (select clock_timestamp()) and r.subject ~ v_pattern
      order by r.deadline
      limit claim_requests.max_requests
      for no key update skip locked
    )
    update klieo.requests r
    set claimed_by = claim_requests.process
    where r.id = any (array(select open.id from open))
    returning r.id, r.subject, r.headers, r.payload, (extract(epoch from r.deadline - clock_timestamp()) * 1000)::double precision;
end
$$;
comment on function klieo.claim_requests(text, int, int) is 'Gives open requests to a responding process, with the ms that are left of each.';

-- The first reply removes the request, so there is no second.
create function klieo.reply_to_request(id uuid, process int, ok boolean, payload bytea, channel text, notice text) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
  v_inbox text;
begin
  with answered as (
    delete from klieo.requests r
    where r.id = reply_to_request.id and r.claimed_by = reply_to_request.process and r.deadline > clock_timestamp()
    returning r.id, r.inbox, r.deadline
  )
  insert into klieo.replies as p (request_id, inbox, ok, payload, expires_at)
  select a.id, a.inbox, reply_to_request.ok, reply_to_request.payload, a.deadline from answered a
  on conflict do nothing
  returning p.inbox into v_inbox;
  if v_inbox is not null and reply_to_request.channel is not null then
    perform pg_notify(reply_to_request.channel, replace(reply_to_request.notice, '<inbox>', v_inbox));
  end if;
  return v_inbox;
end
$$;
comment on function klieo.reply_to_request(uuid, int, boolean, bytea, text, text) is
  'Replies to a request that still waits and is still the process''s; answers its inbox, or null. The inbox is put where the notice says <inbox>.';

create function klieo.pick_up_replies(inbox text) returns table (request_id uuid, ok boolean, payload bytea)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
  return query delete from klieo.replies p where p.inbox = pick_up_replies.inbox returning p.request_id, p.ok, p.payload;
end
$$;
comment on function klieo.pick_up_replies(text) is 'The replies of an inbox, which are gone then.';

-- ---------------------------------------------------------------- presence

create function klieo.new_instance() returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return nextval('klieo.instance_id');
end
$$;
comment on function klieo.new_instance() is 'A number for a process that answers requests.';

create function klieo.register_responders(process int, filters text[], alive_ms double precision) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
  delete from klieo.responders r where r.instance_id = register_responders.process;
  insert into klieo.responders (instance_id, filter, pattern, alive_until)
  select register_responders.process, f.filter, klieo.filter_pattern(f.filter),
    clock_timestamp() + make_interval(secs => register_responders.alive_ms / 1000)
  from unnest(register_responders.filters) as f(filter);
end
$$;
comment on function klieo.register_responders(int, text[], double precision) is
  'The responders of a process, anew. They count as live while it holds its lock, or, with alive_ms, for so long without another sign of life.';

create function klieo.sign_of_life(process int, alive_ms double precision) returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
  v_rows int;
begin
  update klieo.responders r
  set alive_until = clock_timestamp() + make_interval(secs => sign_of_life.alive_ms / 1000)
  where r.instance_id = sign_of_life.process;
  get diagnostics v_rows = row_count;
  return v_rows;
end
$$;
comment on function klieo.sign_of_life(int, double precision) is
  'The responders of a process live on for alive_ms; answers how many there are: a server crash empties the table.';
