-- klieo-bus, functions: what SQL callers use and the packages are made of, by subject. Here: names and filters.
--
-- Parameters of batches are parallel arrays; payloads travel as one value that is cut up here, because every driver can
-- send one bytea, and none sends many cheaply.
--
-- Plans. The tables swing between empty and full faster than autovacuum looks at them, and a plan made for an empty table
-- reads a full one from end to end (measured: 60 ms instead of 2 ms for a claim of 100 out of 40,000). Every statement here
-- has an index that is right at any size, so the functions forbid the other ways, and look rows up by = any(array) or in a
-- lateral subquery, where the planner cannot turn the join round (measured: 5 ms instead of 0.9 ms for 100 acks).
--
-- Rights. Nobody but the owner has any on a table. What a role may do is which functions it may call (0011_roles.sql), and those run
-- as the owner: `security definer`. Every function pins its search_path, those that run as their caller as well: else one of the
-- same name in a schema that comes first, or with arguments that match better, would be called instead (docs/adr/0010-roles.md).
--
-- SQLSTATEs of our own: KB001 the durable does not exist; KB002 must not run in a transaction that has written;
-- KB003 needs READ COMMITTED; KB004 the database was restored from a dump and needs klieo.rebase(); KB005 the durable has
-- another filter.
-- Bad arguments are 22023, too large ones 54000.

create function klieo.filter_pattern(filter text) returns text
language sql immutable strict parallel safe
set search_path = pg_catalog, pg_temp as $$
  select '^' || string_agg(
    case token when '*' then '[^.]+' when '>' then '.+' else regexp_replace(token, '([^A-Za-z0-9_-])', '\\\1', 'g') end,
    '\.' order by n) || '$'
  from unnest(string_to_array(filter, '.')) with ordinality as t(token, n)
$$;
comment on function klieo.filter_pattern(text) is 'The regular expression of a filter: * is one token, a last > one or more.';

create function klieo.check_subject(subject text) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp as $$
begin
  if subject is null or octet_length(subject) > 1024
    or subject !~ '^[\x21-\x29\x2b-\x2d\x2f-\x3d\x3f-\x7e]+(\.[\x21-\x29\x2b-\x2d\x2f-\x3d\x3f-\x7e]+)*$'
    or subject ~ '^(\$|_INBOX)' then
    raise exception 'subject must be 1 to 1024 bytes of tokens joined by ".", of printable ASCII without wildcards, the first token not beginning with $ or _INBOX'
      using errcode = '22023';
  end if;
end
$$;
comment on function klieo.check_subject(text) is 'Raises 22023 unless a message may be published there.';

create function klieo.check_name(argument text, name text) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp as $$
begin
  if name is null or length(name) > (case when argument = 'bucket' and left(name, 6) = 'dedup.' then 134 else 128 end) or name !~ '^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$' then
    raise exception '% must be 1 to 128 characters of A-Z a-z 0-9 _ - with single dots between them', argument using errcode = '22023';
  end if;
end
$$;
comment on function klieo.check_name(text, text) is 'Raises 22023 unless it may name a queue or bucket.';

create function klieo.check_key(bucket text, key text, writing boolean) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp as $$
begin
  perform klieo.check_name('bucket', bucket);
  if left(bucket, 6) = 'dedup.' then
    if writing then
      raise exception 'bucket must not begin with "dedup.": those buckets are written by enqueue alone' using errcode = '22023';
    end if;
    if key is null or length(key) not between 1 and 512 then
      raise exception 'key must be 1 to 512 characters' using errcode = '22023';
    end if;
  elsif key is null or length(key) > 512 or key !~ '^[A-Za-z0-9_/=-]+(\.[A-Za-z0-9_/=-]+)*$' then
    raise exception 'key must be 1 to 512 characters of A-Z a-z 0-9 _ - / = . with no dot first, last or doubled' using errcode = '22023';
  end if;
end
$$;
comment on function klieo.check_key(text, text, boolean) is 'Raises 22023 unless bucket and key are well-formed, and for writing not those of the bus.';

create function klieo.check_headers(headers jsonb) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp as $$
begin
  if headers is null or jsonb_typeof(headers) <> 'object' then
    raise exception 'headers must be a JSON object of strings' using errcode = '22023';
  end if;
  if headers <> '{}' and exists (
    select from jsonb_each(headers) h
    where jsonb_typeof(h.value) <> 'string' or h.key !~ '^[\x21-\x39\x3b-\x7e]+$' or h.value #>> '{}' ~ '[\r\n]'
  ) then
    raise exception 'headers must have printable ASCII names without ":" and space, and strings without CR and LF as values' using errcode = '22023';
  end if;
  if (select sum(octet_length(h.key) + octet_length(h.value)) from jsonb_each_text(headers) h) > 65536 then
    raise exception 'headers must be at most 64 KiB, names and values together' using errcode = '22023';
  end if;
end
$$;
comment on function klieo.check_headers(jsonb) is 'Raises 22023 unless it is an object of strings with legal names and values.';

create function klieo.check_payload(argument text, payload bytea) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp as $$
begin
  if payload is null then
    raise exception '% must not be null', argument using errcode = '22023';
  elsif octet_length(payload) > 8388608 then
    raise exception '% must be at most 8 MiB', argument using errcode = '54000';
  end if;
end
$$;
comment on function klieo.check_payload(text, bytea) is 'Raises 22023 for null and 54000 beyond 8 MiB.';
